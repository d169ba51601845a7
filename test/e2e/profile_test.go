package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

type spread struct{ Average, P50, Max float64 }

// profileOf runs specql profile and gives the phases' means, that of the total, and checks that they add up.
func profileOf(t *testing.T, d *dev, args ...string) (phases map[string]float64, total float64) {
	t.Helper()
	status, stdout, stderr := run(t, t.TempDir(), []string{"SPECQL_ADDRESS=" + d.api}, append([]string{"profile", "-o", "json"}, args...)...)
	require.Zero(t, status, "%s\n%s", stdout, stderr)
	var doc struct {
		Requests, Profiled, Failed int
		TotalSeconds               spread
		Phases                     []struct {
			Name           string
			Share, Average float64
		}
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &doc), stdout)
	require.Equal(t, doc.Requests, doc.Profiled, stdout)
	phases = map[string]float64{}
	sum := 0.0
	for _, p := range doc.Phases {
		phases[p.Name] = p.Average
		require.NotContains(t, []string{"other"}, p.Name)
		if p.Name != "unaccounted" {
			require.GreaterOrEqual(t, p.Average, 0.0, p.Name)
			sum += p.Average
		}
	}
	t.Logf("total %.2f ms, phases %.2f ms: %v", 1000*doc.TotalSeconds.Average, 1000*sum, phases)
	require.InEpsilon(t, doc.TotalSeconds.Average, sum, 0.05, "the phases add up to the total")
	return phases, doc.TotalSeconds.Average
}

func TestProfileSaysWhereTheTimeGoes(t *testing.T) {
	const work = 0.1 // seconds
	d, r := withServices(t)
	r.on("worker.work", func(w http.ResponseWriter, _ *http.Request, _ request) {
		time.Sleep(work * 1e9) // the work of the service
		w.WriteHeader(http.StatusOK)
		_, _ = w.Write([]byte(`{"a":`))
		_ = http.NewResponseController(w).Flush()
		time.Sleep(work * 1e9)
		_, _ = w.Write([]byte(`1}`))
	})
	report := filepath.Join(t.TempDir(), "profile.html")
	phases, total := profileOf(t, d, "--service", "worker", "--requests", "5", "--report", report)
	require.GreaterOrEqual(t, phases["first_byte"], work)
	require.GreaterOrEqual(t, phases["body"], work*0.9)
	require.Less(t, phases["first_byte"]+phases["body"], total)
	for _, name := range []string{"client", "orchestrator", "journal", "dispatch", "policy", "runner", "connect", "send", "output_check"} {
		require.Positive(t, phases[name], name)
		require.Less(t, phases[name], total/2, name)
	}
	page, err := os.ReadFile(report)
	require.NoError(t, err)
	require.Contains(t, string(page), "Where the time goes")
	require.Contains(t, string(page), "first_byte")
}

func TestProfileOfAScript(t *testing.T) {
	r := newRecorder(t)
	m := services(t, r)
	require.NoError(t, os.WriteFile(filepath.Join(m.scripts, "transform.py"), []byte("import time\ntime.sleep(0.3)\nprint('{\"result\": {}, \"data\": []}')\n"), 0o600))
	phases, total := profileOf(t, start(t, m), "--service", "data_processor", "--operation", "transform", "--requests", "3", "--input", `{"data": 1}`)
	require.GreaterOrEqual(t, phases["remote"], 0.3)
	require.Less(t, phases["remote"], total)
	require.Positive(t, phases["sandbox"])
	require.Positive(t, phases["policy"])
}

func TestProfileOfACallThatFails(t *testing.T) {
	d, r := withServices(t)
	r.says("worker.work", http.StatusBadRequest, map[string]any{})
	phases, _ := profileOf(t, d, "--service", "worker", "--requests", "2")
	require.Positive(t, phases["first_byte"])

	status, _, stderr := run(t, t.TempDir(), []string{"SPECQL_ADDRESS=" + d.api}, "profile", "--service", "worker", "--requests", "0")
	require.Equal(t, 2, status)
	require.Contains(t, stderr, "--requests must be between 1 and 10000")
}

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
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

// measured calls an operation some times and holds what the mesh says of it against this process's own clock: each
// call's phases, none of which comes from that clock, are what the caller waited. It gives their sums over all calls.
func measured(t *testing.T, d *dev, calls int, service, operation string, input map[string]any) (phases map[string]float64, waited float64, runs []*client.Run) {
	t.Helper()
	_, _, err := d.List(t.Context(), &specqlv1.ListRunsRequest{}) // there is a connection
	require.NoError(t, err)
	phases = map[string]float64{}
	sum := 0.0
	for range calls {
		req, err := client.Action{
			Workflow: fmt.Sprintf("actions: [{call_service: {service: %s, operation: %s, input: $input, as: done}}]\noutput: $done\n", service, operation), Input: input,
		}.Request()
		require.NoError(t, err)
		req.Wait, req.Profile = durationpb.New(time.Minute), true
		began := time.Now()
		res, err := d.Orchestrator().ExecuteAction(t.Context(), req)
		took := time.Since(began)
		require.NoError(t, err)
		require.NoError(t, client.Outcome(res.GetRun()))
		served := time.Duration(0)
		for _, p := range res.GetProfile().GetPhases() {
			phases[p.GetName()] += p.GetDuration().AsDuration().Seconds()
			served += p.GetDuration().AsDuration()
		}
		require.LessOrEqual(t, served, took, "no phase is counted twice")
		sum += served.Seconds()
		waited += took.Seconds()
		runs = append(runs, res.GetRun())
	}
	t.Logf("%s.%s: %d calls, the caller waited %.2f ms by its clock, the phases are %.2f ms (%.2f%%): %v",
		service, operation, calls, 1000*waited, 1000*sum, 100*sum/waited, phases)
	require.InEpsilon(t, waited, sum, 0.05, "the phases add up to what the caller waited")
	return phases, waited, runs
}

func TestProfileSaysWhereTheTimeGoes(t *testing.T) {
	const work = 0.2 // seconds
	d, r := withServices(t)
	var mu sync.Mutex
	took := 0.0 // by the service's own clock
	r.on("worker.work", func(w http.ResponseWriter, _ *http.Request, _ request) {
		began := time.Now()
		time.Sleep(work * 1e9) // the work of the service
		w.WriteHeader(http.StatusOK)
		_, _ = w.Write([]byte(`{"a":`))
		_ = http.NewResponseController(w).Flush()
		time.Sleep(work * 1e9)
		_, _ = w.Write([]byte(`1}`))
		mu.Lock()
		defer mu.Unlock()
		took += time.Since(began).Seconds()
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

	mu.Lock()
	took = 0
	mu.Unlock()
	sums, waited, _ := measured(t, d, 5, "worker", "work", map[string]any{"n": 1})
	mu.Lock()
	defer mu.Unlock()
	require.InDelta(t, took, sums["first_byte"]+sums["body"], 0.05*waited, "what the service took by its own clock")
}

func TestProfileOfAScript(t *testing.T) {
	r := newRecorder(t)
	m := services(t, r)
	require.NoError(t, os.WriteFile(filepath.Join(m.scripts, "transform.py"), []byte(`import json, time
began = time.perf_counter()
time.sleep(0.4)
print(json.dumps({"result": {"took": time.perf_counter() - began}, "data": []}))
`), 0o600))
	d := start(t, m)
	phases, total := profileOf(t, d, "--service", "data_processor", "--operation", "transform", "--requests", "3", "--input", `{"data": 1}`)
	require.GreaterOrEqual(t, phases["remote"], 0.4)
	require.Less(t, phases["remote"], total)
	require.Positive(t, phases["sandbox"])
	require.Positive(t, phases["policy"])

	sums, _, runs := measured(t, d, 3, "data_processor", "transform", map[string]any{"data": 1})
	took := 0.0
	for _, r := range runs {
		took += r.GetOutput().GetStructValue().GetFields()["result"].GetStructValue().GetFields()["took"].GetNumberValue()
	}
	require.Positive(t, took)
	require.GreaterOrEqual(t, sums["remote"], took, "what the script took by its own clock")
}

func TestProfileOfAContainer(t *testing.T) {
	image(t, "specql/e2e-profile", "local", "testdata/works")
	dir := t.TempDir()
	registry := filepath.Join(dir, "registry.yaml")
	require.NoError(t, os.WriteFile(registry, []byte(`services:
  - name: container
    type: container
    category: test
    execution_type: docker
    runner_config: {image: "specql/e2e-profile:local", pull_policy: never}
    security_policy: {allowed_images: ["specql/e2e-profile:local"], resource_limits: {memory_mb: 64}}
    operations: [{name: work, input_schema: {seconds: number}}]
`), 0o600))
	d := start(t, mesh{args: []string{"--registry", registry}})
	phases, total := profileOf(t, d, "--service", "container", "--requests", "3", "--input", `{"seconds": 0.3}`)
	require.GreaterOrEqual(t, phases["remote"], 0.3)
	require.Less(t, phases["remote"], total)
	for _, name := range []string{"image", "sandbox", "cleanup", "policy", "journal", "dispatch", "runner"} {
		require.Positive(t, phases[name], name)
	}

	began := time.Now()
	sums, waited, runs := measured(t, d, 3, "container", "work", map[string]any{"seconds": 0.3})
	took := 0.0
	for _, r := range runs {
		took += r.GetOutput().GetStructValue().GetFields()["took"].GetNumberValue()
	}
	require.Positive(t, took)
	ran := containersRan(t, began, runs)
	t.Logf("the programs took %.2f ms by their own clock, the containers ran for %.2f ms by the engine's", 1000*took, 1000*ran)
	require.GreaterOrEqual(t, sums["remote"], took, "what the programs took by their own clock")
	require.GreaterOrEqual(t, sums["remote"], 0.95*ran, "how long the containers ran by the engine's clock")
	require.LessOrEqual(t, sums["remote"], waited-sums["sandbox"]-sums["cleanup"])
}

// containersRan is for how many seconds the containers of some runs have run in all, by the engine's own clock.
func containersRan(t *testing.T, since time.Time, runs []*client.Run) float64 {
	t.Helper()
	ours := map[string]bool{}
	for _, r := range runs {
		for _, j := range r.GetJobs() {
			ours[j.GetId()] = true
		}
	}
	stamp := func(t time.Time) string { return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()) }
	query := url.Values{"since": {stamp(since)}, "until": {stamp(time.Now())}, "filters": {`{"type": ["container"], "event": ["start", "die"], "label": ["dev.specql.job"]}`}}
	resp, err := engine(t).Get("http://docker/events?" + query.Encode())
	require.NoError(t, err)
	defer func() { require.NoError(t, resp.Body.Close()) }()
	var ran int64
	seen := map[string]int{}
	for events := json.NewDecoder(resp.Body); ; {
		var e struct {
			Action   string
			TimeNano int64
			Actor    struct{ Attributes map[string]string }
		}
		if err := events.Decode(&e); err != nil {
			require.ErrorIs(t, err, io.EOF)
			break
		}
		if !ours[e.Actor.Attributes["dev.specql.job"]] {
			continue
		}
		seen[e.Action]++
		if e.Action == "start" {
			ran -= e.TimeNano
		} else {
			ran += e.TimeNano
		}
	}
	require.Equal(t, map[string]int{"start": len(runs), "die": len(runs)}, seen)
	return float64(ran) / 1e9
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

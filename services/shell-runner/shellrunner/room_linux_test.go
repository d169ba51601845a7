package shellrunner

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
)

// jobGroups are the names of a runner's control groups, and of those the ones with a process in
// them that is neither a launcher nor one that has given its memory back.
func jobGroups(t *testing.T, r *Runner) (all, inUse map[string]bool) {
	t.Helper()
	all, inUse = map[string]bool{}, map[string]bool{}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/specql/" + groupParent + "-" + cgroup.Instance() + "/job-*-" + filepath.Base(r.temp)[len(tempPrefix):])
	require.NoError(t, err)
	for _, g := range groups {
		all[filepath.Base(g)] = true
		text, err := os.ReadFile(filepath.Join(g, "cgroup.procs"))
		if err != nil {
			continue // removed meanwhile
		}
		for pid := range strings.FieldsSeq(string(text)) {
			line, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
			if len(line) > 0 && err == nil && !strings.HasPrefix(string(line), "specql-sandbox") {
				inUse[filepath.Base(g)] = true
			}
		}
	}
	return all, inUse
}

// TestLimitsOfGroupsMadeAhead lets jobs with different limits follow one another: a control group is made with those
// of the job before.
func TestLimitsOfGroupsMadeAhead(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	hog := `x=0123456789abcdef; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do x=$x$x; done; echo '{"ok":true}'`
	for range 4 { // more than launchers wait
		s.fails(sh(hog).with(Limits{MemoryMB: 16, CPUCores: 1, Processes: 3}), "RESOURCE_EXCEEDED", "limit of 16 MiB")
		require.Equal(t, true, s.ok(sh(hog).with(Limits{MemoryMB: 256}))["ok"])
		require.Equal(t, true, s.ok(sh(hog))["ok"])
		s.fails(sh(`true | true | true | true || exit 1; exit 1`).with(Limits{Processes: 1}), "RESOURCE_EXCEEDED", "limit of 1")
	}
}

// TestTextsThatWereDecoded goes through more services than are kept decoded.
func TestTextsThatWereDecoded(t *testing.T) {
	r := newRunner(t, Options{})
	job := func(policy string) *runner.Job {
		return &runner.Job{Service: runner.Service{Policy: []byte(policy)}, Operation: runner.Operation{Config: []byte(`{"command":["/bin/true"]}`)}}
	}
	for i := range maxTexts + 20 {
		d, err := r.decode(job(`{"allowed_commands":["/bin/` + strconv.Itoa(i) + `"]}`))
		require.NoError(t, err)
		again, err := r.decode(job(`{"allowed_commands":["/bin/` + strconv.Itoa(i) + `"]}`))
		require.NoError(t, err)
		require.Same(t, d, again)
		require.Equal(t, []string{"/bin/" + strconv.Itoa(i)}, d.effective.Policy.AllowedCommands)
		require.LessOrEqual(t, len(r.texts.known), maxTexts)
	}
	for _, policy := range []string{`{"no_such":1}`, `{"resource_limits":{"processes":-1}}`, "{}\x00{}", `{"allowed_commands":["` + strings.Repeat("x", maxText) + `"]}`} {
		first, _ := r.decode(job(policy))
		again, _ := r.decode(job(policy))
		require.NotSame(t, first, again, "%.40s", policy)
	}
}

func TestInputThatFitsIntoAPipe(t *testing.T) {
	s := newShell(t, Options{})
	for _, size := range []int{atOnce - 1, atOnce, atOnce + 1, 16 * atOnce, 1 << 20} {
		c := call{Policy: Policy{AllowedCommands: []string{"/bin/cat", "/bin/true"}}, Operation: Operation{Command: []string{"/bin/cat"}}}
		c.Input = map[string]any{"x": strings.Repeat("x", size-len(`{"x":""}`))}
		require.Equal(t, c.Input, s.ok(c))
		c.Operation.Command[0] = "/bin/true" // it need not read
		s.ok(c)
	}
}

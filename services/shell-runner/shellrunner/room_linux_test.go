package shellrunner

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

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

package cgroup

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzStat reads files of control groups that have anything in them.
func FuzzStat(f *testing.F) {
	for _, text := range []string{
		"usage_usec 12\nnr_periods 0\n", "8:0 Read 4096\n8:0 Write 18446744073709551615\nTotal 1\n", "8:0 rbytes=4096 wbytes=-1 rios=1", "max\n", "1\n0\n-5\n99999999999999999999\n", "oom_kill 18446744073709551615",
	} {
		f.Add([]byte(text))
	}
	path := filepath.Join(f.TempDir(), "file")
	f.Fuzz(func(t *testing.T, text []byte) {
		require.NoError(t, os.WriteFile(path, text, 0o600))
		n, err := readNumber(path)
		if v := scaled(n, mebibyte, err); v != nil {
			require.GreaterOrEqual(t, *v, 0.0)
		}
		keys, err := readKeys(path)
		require.NoError(t, err)
		require.GreaterOrEqual(t, count(keys["oom_kill"]), 0)
		_, _, err = readBlkio(path)
		require.NoError(t, err)
		_, _, err = readIOStat(path)
		require.NoError(t, err)
		pids, err := readPIDs(path)
		require.NoError(t, err)
		for _, pid := range pids {
			require.Positive(t, pid, "kill(0) and kill(-1) would end others")
		}
		require.LessOrEqual(t, len(unescape(string(text))), len(text))
	})
}

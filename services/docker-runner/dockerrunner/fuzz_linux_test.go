package dockerrunner

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzMounts reads a list of mounts: whoever may mount chooses what their paths hold.
func FuzzMounts(f *testing.F) {
	f.Add([]byte("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n23 22 0:5 /a\\040b /mnt/x\\134y rw - proc proc rw\n"), "/mnt/x")
	f.Add([]byte("1 2 3 \\ \\777 -  - \n\\1 - a"), "..")
	f.Fuzz(func(t *testing.T, text []byte, p string) {
		all := parseMounts(text)
		for _, m := range all {
			require.NotEmpty(t, m.kind)
			require.LessOrEqual(t, len(m.place), len(text))
		}
		if strings.HasPrefix(p, "/") {
			_ = find(all, p)
		}
	})
}

package runner

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzReadPolicy reads the file of --policy.
func FuzzReadPolicy(f *testing.F) {
	for _, text := range []string{"allowed_domains: [a.example]", "", "null", "a: &a [*a]", "a: .nan", "1: {2: 3}", "a: 2026-01-01", "a: &x [1,1]\nb: &y [*x,*x]\nc: [*y,*y]", "a: !!binary AA=="} {
		f.Add([]byte(text))
	}
	path := filepath.Join(f.TempDir(), "policy.yaml")
	f.Fuzz(func(t *testing.T, text []byte) {
		require.NoError(t, os.WriteFile(path, text, 0o600))
		raw, err := readPolicy(path)
		if err != nil {
			return
		}
		var policy map[string]any
		require.NoError(t, json.Unmarshal(raw, &policy))
		require.NotNil(t, policy)
	})
}

package command_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/cmd/specql/internal/command"
	"github.com/specql/mesh/pkg/mesh"
)

func TestTokenAndItsEntry(t *testing.T) {
	t.Parallel()
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		status := command.Execute(t.Context(), command.IO{In: &bytes.Buffer{}, Out: &out, Err: &errs, LookupEnv: func(string) (string, bool) { return "", false }}, append([]string{"token"}, args...))
		return status, out.String(), errs.String()
	}
	status, out, _ := run("--subject", "ci", "--role", "operator", "--tenant", "acme", "--expires-in", "1h", "-o", "json")
	require.Zero(t, status)
	var made struct {
		Token string
		Entry struct {
			Subject, Role, Hash, Expires string
			Tenants                      []string
		}
	}
	require.NoError(t, json.Unmarshal([]byte(out), &made))
	require.Equal(t, mesh.HashToken(made.Token), made.Entry.Hash)
	require.Equal(t, []string{"acme"}, made.Entry.Tenants)
	require.NotEmpty(t, made.Entry.Expires)
	for _, wrong := range [][]string{{}, {"--subject", "a"}, {"--subject", "a", "--role", "king"}, {"--subject", "a\nb", "--role", "viewer"}} {
		status, out, _ := run(wrong...)
		require.Equal(t, command.Misuse, status)
		require.Empty(t, out)
	}
}

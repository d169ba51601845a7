package command

import (
	"bytes"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReferenceIsCurrent(t *testing.T) {
	t.Setenv("SPECQL_ADDRESS", "mesh.example:7350") // whoever generates it has variables of their own
	var page bytes.Buffer
	require.NoError(t, Reference(&page))
	for _, want := range []string{"\n## specql runs signal\n", `(SPECQL_ADDRESS) (default "127.0.0.1:7350")`, "\n- [`specql completion bash`](#specql-completion-bash): "} {
		require.Contains(t, page.String(), want)
	}
	written, err := os.ReadFile("../../../../docs/reference/commands.md")
	require.NoError(t, err)
	require.Equal(t, string(written), page.String(), "run 'make generate' and commit docs/reference/commands.md")
}

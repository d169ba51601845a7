package runner

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRequire(t *testing.T) {
	t.Parallel()
	features := []Feature{{Name: "here", Available: true}, {Name: "gone", Detail: "the kernel is old"}, {Name: "away", Detail: "no rights"}}
	require.NoError(t, Require(features, nil))
	require.NoError(t, Require(features, []string{"here"}))
	require.NoError(t, Require(features[:1], []string{RequireAll}))
	require.EqualError(t, Require(features, []string{"here", "gone"}), "--require-isolation: this machine lacks gone (the kernel is old)")
	require.EqualError(t, Require(features, []string{RequireAll}), "--require-isolation: this machine lacks gone (the kernel is old); away (no rights)")
	require.EqualError(t, Require(features, []string{"her"}), `--require-isolation: "her" is not known; write all, or some of here, gone, away`)
}

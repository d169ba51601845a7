package runner_test

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
)

func TestLenientKeepsWhatFits(t *testing.T) {
	t.Parallel()
	type config struct {
		A string   `json:"a"`
		B int      `json:"b"`
		C []string `json:"c"`
		D struct {
			E bool `json:"e"`
		} `json:"d"`
	}
	got := runner.Lenient[config](json.RawMessage(`{"a": "x", "b": "no number", "unknown": 1, "c": ["y"], "d": {"e": true, "f": 2}}`))
	require.Equal(t, "x", got.A)
	require.Zero(t, got.B)
	require.Equal(t, []string{"y"}, got.C)
	require.True(t, got.D.E)
	require.Equal(t, config{}, runner.Lenient[config](json.RawMessage(`no JSON`)))
}

func TestLenientGoesOnBehindAScalar(t *testing.T) {
	t.Parallel()
	type config struct {
		Environment map[string]runner.Scalar `json:"environment"`
		List        []runner.Scalar          `json:"list"`
		After       string                   `json:"after"`
	}
	raw := json.RawMessage(`{"environment": {"A": {"no": "scalar"}, "PORT": 8080, "ON": true, "BIG": 12345678901234567890}, "list": ["a", [], "c"], "after": "x"}`)
	_, err := runner.Decode[config](raw)
	require.ErrorContains(t, err, "environment.A")
	got := runner.Lenient[config](raw)
	require.Equal(t, map[string]runner.Scalar{"PORT": "8080", "ON": "true", "BIG": "12345678901234567890"}, got.Environment)
	require.Equal(t, runner.Scalar("c"), got.List[2])
	require.Equal(t, "x", got.After)
}

func TestAppendProblemsSaysNothingTwice(t *testing.T) {
	t.Parallel()
	found := []runner.Problem{{Path: "a.b[1]"}, {Path: "c", Warning: true}}
	later := []runner.Problem{{Path: "a.b[1]"}, {Path: "a.b[1].x"}, {Path: "a.b[10]"}, {Path: "a.b"}, {Path: "a.bc"}, {Path: "c"}, {Path: ""}}
	var kept []string
	for _, p := range runner.AppendProblems(found, later...)[2:] {
		kept = append(kept, p.Path)
	}
	require.Equal(t, []string{"a.b[10]", "a.b", "a.bc", "c", ""}, kept)
}

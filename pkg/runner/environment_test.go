package runner

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestUnset(t *testing.T) {
	t.Setenv("TEST_IS_SET", "the-value")
	t.Setenv("TEST_IS_EMPTY", "")
	config := json.RawMessage(`{
		"ca_env_var": "TEST_IS_SET", "token_env_var": "TEST_IS_NOT_SET", "x": [{"password_env_var": "TEST_IS_EMPTY"}],
		"own": {"key_env_var": "SPECQL_TOKEN"}, "held": {"key_env_var": "sk_live_0123abc"}, "none": {"key_env_var": ""}, "odd": {"key_env_var": 5},
		"forbidden": {"key_env_var": "TEST_IS_FORBIDDEN"}, "nested_env_var": {"deep_env_var": "TEST_DEEP"}
	}`)
	got := map[string]string{}
	for _, p := range unset(config, []Problem{{Path: "runner_config.forbidden.key_env_var", Message: "not listed"}}) {
		require.True(t, p.Warning)
		require.Contains(t, p.Mend, "where the runner starts")
		require.NotContains(t, p.Message, "the-value")
		require.NotContains(t, p.Message, "sk_live", "it may be the secret")
		got[p.Path] = p.Message
	}
	require.Len(t, got, 4, "%v", got)
	require.Contains(t, got["runner_config.token_env_var"], "TEST_IS_NOT_SET is not set")
	require.Contains(t, got["runner_config.x[0].password_env_var"], "TEST_IS_EMPTY")
	require.Contains(t, got["runner_config.nested_env_var.deep_env_var"], "TEST_DEEP")
	require.Contains(t, got, "runner_config.held.key_env_var")
	require.Empty(t, unset(json.RawMessage(`{`), nil))
	require.Empty(t, unset(nil, nil))
}

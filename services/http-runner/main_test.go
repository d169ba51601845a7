package main

import (
	"encoding/json"
	"log/slog"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
)

func TestBuild(t *testing.T) {
	t.Parallel()
	for policy, says := range map[string]string{
		``: "",
		`{"allowed_domains":["*.example.com"],"allowed_ports":[443]}`: "",
		`{"allowed_domain":["x"]}`:                                    "--policy",
		`{"allowed_domains":["https://x"]}`:                           "allowed_domains[0]",
		`{"rate_limit_per_minute":-1}`:                                "rate_limit_per_minute",
	} {
		fs := pflag.NewFlagSet("", pflag.ContinueOnError)
		flags(fs)
		jr, err := build(t.Context(), &runner.Env{Logger: slog.New(slog.DiscardHandler), PolicyJSON: json.RawMessage(policy), Flags: fs})
		if says == "" {
			require.NoError(t, err)
			d, err := jr.Describe(t.Context())
			require.NoError(t, err)
			require.Equal(t, "http-runner", d.Name)
			continue
		}
		require.ErrorContains(t, err, says)
	}
}

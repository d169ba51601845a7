package config_test

import (
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/config"
)

func TestFlagsAndVariables(t *testing.T) {
	t.Parallel()
	var (
		concurrency int
		drain       time.Duration
		runners     []string
		listen      string
		insecure    bool
	)
	define := func() *pflag.FlagSet {
		fs := pflag.NewFlagSet("x", pflag.ContinueOnError)
		fs.IntVar(&concurrency, "max-concurrency", 64, "")
		fs.DurationVar(&drain, "drain-timeout", time.Second, "")
		fs.StringSliceVar(&runners, "runner", nil, "")
		fs.StringVar(&listen, "listen", "", "")
		fs.BoolVar(&insecure, "insecure", false, "")
		return fs
	}
	lookup := func(m map[string]string) func(string) (string, bool) {
		return func(name string) (string, bool) {
			v, ok := m[name]
			return v, ok
		}
	}

	fs := define()
	require.NoError(t, fs.Parse([]string{"--max-concurrency", "5"}))
	require.NoError(t, config.BindFrom(fs, lookup(map[string]string{
		"SPECQL_MAX_CONCURRENCY": "7", "SPECQL_DRAIN_TIMEOUT": "1m", "SPECQL_RUNNER": "a=1,b=2", "SPECQL_INSECURE": "true", "SPECQL_LISTEN": "",
	})))
	require.Equal(t, 5, concurrency, "a flag goes over its variable")
	require.Equal(t, time.Minute, drain)
	require.Equal(t, []string{"a=1", "b=2"}, runners)
	require.True(t, insecure)
	require.Empty(t, listen, "an empty variable is not set")
	require.NoError(t, config.Require(fs, "runner"))
	require.EqualError(t, config.Require(fs, "listen", "max-concurrency"), "--listen or SPECQL_LISTEN is needed")

	err := config.BindFrom(define(), lookup(map[string]string{"SPECQL_MAX_CONCURRENCY": "many", "SPECQL_DRAIN_TIMEOUT": "5"}))
	require.ErrorContains(t, err, "--max-concurrency from SPECQL_MAX_CONCURRENCY")
	require.ErrorContains(t, err, "--drain-timeout from SPECQL_DRAIN_TIMEOUT", "all are told at once")
	require.Error(t, config.Require(define(), "runner"))
}

func TestBindReadsTheEnvironment(t *testing.T) {
	t.Setenv("SPECQL_LOG_LEVEL", "debug")
	fs := pflag.NewFlagSet("x", pflag.ContinueOnError)
	level := fs.String("log-level", "info", "")
	require.NoError(t, config.Bind(fs))
	require.Equal(t, "debug", *level)
}

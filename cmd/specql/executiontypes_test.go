package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

type executionTypes struct {
	Types []struct {
		Name    string
		Enabled bool
	}
}

func (e executionTypes) disabled() []string {
	out := []string{}
	for _, s := range e.Types {
		if !s.Enabled {
			out = append(out, s.Name)
		}
	}
	return out
}

func TestExecutionTypesAndRollback(t *testing.T) {
	t.Parallel()
	address, _ := dev(t)
	dir := t.TempDir()
	set := func(args ...string) result { return specql(t, dir, append(args, "--address", address)...) }
	state := func(args ...string) []string {
		t.Helper()
		r := set(append(args, "-o", "json")...)
		require.Equal(t, 0, r.status, r.err)
		require.Empty(t, r.err)
		got := decode[executionTypes](t, r.out)
		require.GreaterOrEqual(t, len(got.Types), 4)
		return got.disabled()
	}
	require.Empty(t, state("execution-types"))
	require.Equal(t, []string{"docker", "serverless", "shell"}, state("execution-types", "--disable", "shell", "docker", "serverless"))

	r := set("execute-job", "--entity", "note", "--action", "echo", "--input", `{"text":"hi"}`, "-o", "json")
	require.Equal(t, 1, r.status, r.err)
	require.Equal(t, "DISABLED", decode[run](t, r.out).Error.Code)

	r = set("execution-types", "--enable", "shell", "--disable=http", "docker")
	require.Equal(t, 0, r.status, r.err)
	require.Regexp(t, `(?m)^shell +enabled`, r.out)
	require.Regexp(t, `(?m)^http +disabled`, r.out)
	require.Contains(t, r.err, "http is disabled\n")
	require.Contains(t, r.err, "shell is enabled\n")
	require.NotContains(t, r.err, "serverless")
	r = set("execute-job", "--entity", "note", "--action", "echo", "--input", `{"text":"hi"}`)
	require.Equal(t, 0, r.status, r.err)

	require.Equal(t, []string{"docker", "serverless", "shell"}, state("rollback", "--to", "http-only"))
	require.Equal(t, []string{"docker", "serverless", "shell"}, state("rollback", "--to", "http-only"), "again is fine")
	require.Empty(t, state("execution-types", "--enable", "shell,docker", "serverless"))

	for want, args := range map[string][]string{
		`there is no execution type "shel"`: {"execution-types", "--disable", "shel"},
		"docker, http, serverless, shell":   {"execution-types", "--disable", "shell", "shel"},
		"is to be enabled as well":          {"execution-types", "--disable", "shell", "--enable", "shell"},
		"flag needs an argument":            {"execution-types", "--disable", "-o", "json"},
		"say what to go back to":            {"rollback"},
		`--to "zero" is not known`:          {"rollback", "--to", "zero"},
		"unknown command":                   {"execution-types", "shell"},
	} {
		r := set(args...)
		require.Equal(t, 2, r.status, args)
		require.Contains(t, r.err, want)
	}
	require.Empty(t, state("execution-types"), "what is refused changes nothing")

	r = specql(t, dir, "execution-types", "--address", "127.0.0.1:1")
	require.Equal(t, 1, r.status)
	require.Contains(t, r.err, "no server answers at 127.0.0.1:1")
}

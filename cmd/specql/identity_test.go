package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/server"
)

// The command against a server that wants tokens, over TLS.
func TestTokensOverTLS(t *testing.T) {
	dir := t.TempDir()
	require.Zero(t, specql(t, dir, "certs", ".").status)
	tokens, entries := map[string]string{}, []any{}
	for subject, more := range map[string][]string{
		"vic": {"--role", "viewer", "--tenant", "acme"}, "ann": {"--role", "operator", "--tenant", "acme"}, "gus": {"--role", "operator", "--tenant", "globex"},
	} {
		r := specql(t, dir, append([]string{"token", "-o", "json", "--subject", subject}, more...)...)
		require.Zero(t, r.status, r.err)
		var made struct {
			Token string
			Entry any
		}
		require.NoError(t, json.Unmarshal([]byte(r.out), &made))
		tokens[subject], entries = made.Token, append(entries, made.Entry)
	}
	text, err := json.Marshal(entries) // which is YAML, too
	require.NoError(t, err)
	file := filepath.Join(dir, "tokens.yaml")
	require.NoError(t, os.WriteFile(file, text, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "work.yaml"), []byte("actions: [{wait: {seconds: 0.01}}]\noutput: {done: true}\n"), 0o600))

	var config net.ListenConfig
	lis, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	credentials := loaded(t, dir, "orchestrator")
	serveUntilTheEnd(t, func(ctx context.Context) error {
		return server.Run(ctx, server.Options{
			Listener: lis, Credentials: credentials, RunnerCredentials: credentials, Auth: &server.Auth{Tokens: file},
			Database: "sqlite:" + filepath.Join(dir, "db"), DrainTimeout: time.Second, Logger: slog.New(slog.DiscardHandler),
		})
	})
	as := func(subject string, args ...string) result {
		args = append(args, "-o", "json", "--address", lis.Addr().String(), "--ca", "ca.crt")
		if subject != "" {
			args = append(args, "--token", tokens[subject])
		}
		return specql(t, dir, args...)
	}
	execute := []string{"execute-job", "--file", "work.yaml"}

	for _, args := range [][]string{execute, {"runs", "list"}} {
		r := as("", args...)
		require.Equal(t, 1, r.status, "%v", r)
		require.Contains(t, r.err, "a valid token is needed (--token, SPECQL_TOKEN")
		require.Empty(t, r.out)
	}
	r := as("vic", execute...)
	require.Equal(t, 1, r.status, "%v", r)
	require.Contains(t, r.err, "needs the role operator")
	r = as("ann", execute...)
	require.Zero(t, r.status, "%v", r)
	var done struct{ ID, Status string }
	require.NoError(t, json.Unmarshal([]byte(r.out), &done), r.out)
	require.NotEmpty(t, done.ID, r.out)

	require.Contains(t, as("vic", "runs", "list").out, done.ID)
	require.NotContains(t, as("gus", "runs", "list").out, done.ID)
	require.Contains(t, as("vic", "runs", "show", done.ID).out, done.ID)
	missing, other := as("gus", "runs", "show", "none"), as("gus", "runs", "show", done.ID)
	require.Equal(t, missing.status, other.status)
	require.NotZero(t, other.status)
	require.Empty(t, other.out)
}

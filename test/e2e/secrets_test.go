package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

const secretRegistry = `
services:
  - name: vault
    type: test
    category: test
    execution_type: http
    runner_config:
      base_url: %s/vault
      auth_type: bearer
      auth_config: {token_env_var: VAULT_TOKEN}
      retry_config: {max_retries: 0}
    security_policy: {allowed_domains: ["127.0.0.1"], allow_private_networks: true}
    operations:
      - {name: echo}
      - {name: refuse}
      - {name: garble}
      - {name: redirect}
  - name: variables
    type: test
    category: test
    execution_type: shell
    runner_config: {working_directory: %s}
    security_policy: {allowed_commands: [/usr/bin/env]}
    operations:
      - {name: print, command: [/usr/bin/env]}
`

// What a service gives back of a secret is in no place that the mesh writes to or answers from.
func TestASecretIsNowhere(t *testing.T) {
	const (
		secret = "s3cr3t-0f-the-vault-Zq9xW"
		marker = "harmless-marker-4711"
	)
	forms := map[string]string{"as it is": secret, "in base64": base64.StdEncoding.EncodeToString([]byte(secret)), "in hexadecimal": hex.EncodeToString([]byte(secret))}
	r := newRecorder(t)
	r.on("vault.echo", func(w http.ResponseWriter, req *http.Request, _ request) {
		w.Header().Set("X-Echo", req.Header.Get("Authorization"))
		respond(w, http.StatusOK, map[string]any{"marker": marker, "headers": req.Header, "forms": forms, secret: "as a key"})
	})
	r.on("vault.refuse", func(w http.ResponseWriter, req *http.Request, _ request) {
		w.Header().Set("WWW-Authenticate", "Bearer error="+secret)
		respond(w, http.StatusForbidden, map[string]any{"marker": marker, "error": "wrong: " + req.Header.Get("Authorization"), "forms": forms})
	})
	r.on("vault.garble", func(w http.ResponseWriter, req *http.Request, _ request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"marker": %q, "x": %s`, marker, req.Header.Get("Authorization"))
	})
	r.on("vault.redirect", func(w http.ResponseWriter, _ *http.Request, _ request) {
		w.Header().Set("Location", "http://"+secret+".example.org/"+secret)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	dir := t.TempDir()
	registry := filepath.Join(dir, "registry.yaml")
	require.NoError(t, os.WriteFile(registry, fmt.Appendf(nil, secretRegistry, r.URL, t.TempDir()), 0o600))
	data := filepath.Join(dir, "data")
	d := start(t, mesh{data: data, args: []string{"--registry", registry, "--log-level", "debug"}, env: []string{"VAULT_TOKEN=" + secret}})

	said := map[string]string{}
	for _, call := range []string{"vault, operation: echo", "vault, operation: refuse", "vault, operation: garble", "vault, operation: redirect", "variables, operation: print"} {
		run, err := d.Execute(t.Context(), client.Action{Workflow: "actions: [{call_service: {service: " + call + ", as: it}}]\noutput: $it\n"})
		require.NoError(t, err)
		require.NoError(t, d.Watch(t.Context(), run.GetId(), func(e *client.Event) error {
			said["WatchRun of "+call] += protojson.Format(e)
			return nil
		}, client.WithLogs()))
		run, err = d.Get(t.Context(), run.GetId())
		require.NoError(t, err)
		said["GetRun of "+call] = protojson.Format(run)
		said["the command of "+call] = fmt.Sprint(runOutput(t, d, run.GetId()))
	}
	for _, r := range r.of("vault.echo") {
		require.Equal(t, "Bearer "+secret, r.header.Get("Authorization"), "the service gets it")
	}
	require.Contains(t, said["GetRun of vault, operation: echo"], marker)
	require.Contains(t, said["GetRun of variables, operation: print"], "STATUS_COMPLETED")
	insight := specqlv1.NewInsightServiceClient(d.Conn())
	patterns, err := insight.GetFailurePatterns(t.Context(), &specqlv1.GetFailurePatternsRequest{})
	require.NoError(t, err)
	said["GetFailurePatterns"] = protojson.Format(patterns)
	audit, err := insight.GetSecurityAudit(t.Context(), &specqlv1.GetSecurityAuditRequest{})
	require.NoError(t, err)
	said["GetSecurityAudit"] = protojson.Format(audit)
	for _, page := range []string{"/", "/metrics"} {
		resp, err := http.Get("http://" + d.console + page)
		require.NoError(t, err)
		raw, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		said["the console's "+page] = string(raw)
	}
	files := func() (all []byte) {
		require.NoError(t, filepath.WalkDir(data, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			raw, err := os.ReadFile(path)
			said[path] = string(raw)
			all = append(all, raw...)
			return err
		}))
		return all
	}
	require.True(t, bytes.Contains(files(), []byte(marker)), "the database is where the search looks")
	d.stop()
	files()
	said["the log"] = d.log.String()
	require.NotEmpty(t, said["the log"])
	for place, text := range said {
		for form, s := range forms {
			require.NotContains(t, text, s, "%s has the secret %s", place, form)
		}
	}
}

func runOutput(t *testing.T, d *dev, id string) []string {
	t.Helper()
	_, out, errs := run(t, t.TempDir(), []string{"SPECQL_ADDRESS=" + d.api}, "runs", "show", id)
	return []string{out, errs}
}

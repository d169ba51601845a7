package e2e

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/test/pgtest"
)

const gateRegistry = `
  - name: gate
    type: test
    category: test
    execution_type: shell
    runner_config: {working_directory: %[1]s}
    security_policy: {allowed_commands: [%[1]s/wait.sh, /usr/bin/env, /usr/bin/cat]}
    operations:
      - {name: wait, command: [%[1]s/wait.sh]}
`

// processes gives a file of /proc of every process, by number.
func processes(t *testing.T, file string) map[int]string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	require.NoError(t, err)
	all := map[int]string{}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if raw, err := os.ReadFile(filepath.Join("/proc", e.Name(), file)); err == nil { // else it has just ended
				all[pid] = string(raw)
			}
		}
	}
	return all
}

// below are the processes that one has started, and those that they have.
func below(t *testing.T, pid int) map[int]bool {
	t.Helper()
	parents := map[int]int{}
	for child, stat := range processes(t, "stat") {
		fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
		parent, err := strconv.Atoi(fields[1])
		require.NoError(t, err)
		parents[child] = parent
	}
	found := map[int]bool{}
	for child := range parents {
		for at := parents[child]; at != 0; at = parents[at] {
			if at == pid {
				found[child] = true
				break
			}
		}
	}
	return found
}

// With services in processes of their own over PostgreSQL, a secret is where the call that needs it goes, and in no table, argument,
// environment of what jobs run, log, answer or trace.
func TestASecretIsInNoTableProcessOrTrace(t *testing.T) {
	const (
		secret = "s3cr3t-0f-the-vault-Zq9xW"
		marker = "harmless-marker-4711"
	)
	forms := map[string]string{"as it is": secret, "in base64": base64.StdEncoding.EncodeToString([]byte(secret)), "in hexadecimal": hex.EncodeToString([]byte(secret))}
	r := newRecorder(t)
	r.on("vault.echo", func(w http.ResponseWriter, req *http.Request, _ request) {
		respond(w, http.StatusOK, map[string]any{"marker": marker, "headers": req.Header, "forms": forms, secret: "as a key"})
	})
	r.on("vault.refuse", func(w http.ResponseWriter, req *http.Request, _ request) {
		respond(w, http.StatusForbidden, map[string]any{"marker": marker, "error": "wrong: " + req.Header.Get("Authorization"), "forms": forms})
	})
	scripts := t.TempDir()
	gate := filepath.Join(scripts, "gate")
	require.NoError(t, syscall.Mkfifo(gate, 0o666))
	require.NoError(t, os.Chmod(gate, 0o666)) //nolint:gosec // the job's user reads it
	script := "#!/bin/sh\n/usr/bin/env\n/usr/bin/cat /proc/*/environ 2>/dev/null\nread line < gate\nexit 0\n"
	require.NoError(t, os.WriteFile(filepath.Join(scripts, "wait.sh"), []byte(script), 0o755)) //nolint:gosec // the job's user runs it
	registry := filepath.Join(t.TempDir(), "registry.yaml")
	require.NoError(t, os.WriteFile(registry, append(fmt.Appendf(nil, secretRegistry, r.URL, scripts), fmt.Appendf(nil, gateRegistry, scripts)...), 0o600))

	cluster := pgtest.Start(t)
	database := cluster.NewDatabase(t)
	status, out, errs := run(t, t.TempDir(), nil, "migrate-schema", "--database", database)
	require.Zero(t, status, "%s%s", out, errs)
	traces := newCollector(t)
	z := newZone(t)
	vault := append(traces.env(), "VAULT_TOKEN="+secret)
	web := z.startService(t, "http-runner", vault)
	shell := z.startService(t, "shell-runner", vault) // it has the secret, and gives it to nobody
	o := z.startService(t, "orchestrator", traces.env(), "--database", database, "--registry", registry, "--log-level", "debug",
		"--runner", "http="+web.address, "--runner", "shell="+shell.address)
	file := func(name string) string { return filepath.Join(z.dir, name) }
	c, err := client.New(o.address, client.WithCA(file("ca.crt")), client.WithCertificate(file("client.crt"), file("client.key")))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })

	said := map[string]string{}
	begin := func(call string) *client.Run {
		run, err := c.Execute(t.Context(), client.Action{Workflow: "actions: [{call_service: {service: " + call + ", as: it}}]\noutput: $it\n"})
		require.NoError(t, err)
		return run
	}
	finish := func(call string, run *client.Run) {
		require.NoError(t, c.Watch(t.Context(), run.GetId(), func(e *client.Event) error {
			said["WatchRun of "+call] += protojson.Format(e)
			return nil
		}, client.WithLogs()))
		run, err := c.Get(t.Context(), run.GetId())
		require.NoError(t, err)
		said["GetRun of "+call] = protojson.Format(run)
	}
	for _, call := range []string{"vault, operation: echo", "vault, operation: refuse", "variables, operation: print"} {
		finish(call, begin(call))
	}
	require.Contains(t, said["GetRun of vault, operation: echo"], marker)
	require.Contains(t, said["GetRun of variables, operation: print"], "STATUS_COMPLETED")
	require.Equal(t, "Bearer "+secret, r.of("vault.echo")[0].header.Get("Authorization"), "the service gets it")

	// A script waits at the gate while its processes are looked at.
	waiting := begin("gate, operation: wait")
	opened := make(chan *os.File, 1)
	go func() {
		f, err := os.OpenFile(gate, os.O_WRONLY, 0) // it opens once the script reads
		if err == nil {
			opened <- f
		}
		close(opened)
	}()
	var open *os.File
	select {
	case open = <-opened:
		require.NotNil(t, open)
	case <-time.After(time.Minute):
		unblock, err := os.OpenFile(gate, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		require.NoError(t, err)
		_ = unblock.Close()
		finish("gate", waiting)
		require.Fail(t, "the script does not come to the gate", "%s", said["WatchRun of gate"])
	}
	variables := processes(t, "environ")
	require.Contains(t, variables[web.cmd.Process.Pid], secret, "this is where it would be seen")
	children := below(t, shell.cmd.Process.Pid)
	arguments := processes(t, "cmdline")
	seen := false
	for pid := range children {
		said[fmt.Sprintf("the environment of %q", arguments[pid])] = variables[pid]
		seen = seen || strings.Contains(arguments[pid], "wait.sh")
	}
	require.True(t, seen, "the script is among the processes: %q", arguments)
	said["the environment of the orchestrator"] = variables[o.cmd.Process.Pid]
	require.NotEmpty(t, variables[o.cmd.Process.Pid])
	for pid, text := range arguments {
		said[fmt.Sprintf("the arguments of process %d", pid)] = text
	}
	_, err = open.WriteString("go\n")
	require.NoError(t, err)
	require.NoError(t, open.Close())
	finish("gate", waiting)
	require.Contains(t, said["GetRun of gate"], "STATUS_COMPLETED")

	insight := specqlv1.NewInsightServiceClient(c.Conn())
	patterns, err := insight.GetFailurePatterns(t.Context(), &specqlv1.GetFailurePatternsRequest{})
	require.NoError(t, err)
	said["GetFailurePatterns"] = protojson.Format(patterns)
	_ = c.Close()
	for name, s := range map[string]*service{"orchestrator": o, "http-runner": web, "shell-runner": shell} {
		s.stop() // what it had to export is exported
		said["the log of "+name] = s.log.String()
		require.NotEmpty(t, said["the log of "+name])
	}
	for _, s := range traces.all() {
		said["the traces"] += s.service + protojson.Format(s.Span)
	}
	for _, service := range []string{"orchestrator", "http-runner", "shell-runner"} {
		require.Contains(t, said["the traces"], service)
	}
	rows := 0
	for table := range lines(cluster.Psql(t, database, `SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'v', 'm', 'p') AND n.nspname !~ '^(pg_|information_schema)';`)) {
		said["the table "+table] = cluster.Psql(t, database, "SELECT x::text FROM "+table+" AS x;")
		if strings.Contains(said["the table "+table], marker) {
			rows++
		}
	}
	require.Positive(t, rows, "the tables are where the search looks")
	for place, text := range said {
		for form, s := range forms {
			require.NotContains(t, text, s, "%s has the secret %s", place, form)
		}
	}
}

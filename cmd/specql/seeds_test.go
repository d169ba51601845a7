package main

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

// script runs the lines of a shell script one after the other, as somebody does who copies them from a page.
type script struct {
	t   *testing.T
	dir string
	env []string
}

func (s *script) run(line string) result {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", line)
	cmd.Dir, cmd.Env = s.dir, s.env
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(s.t, err, line)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// ok runs a line that has to succeed, and gives what it printed.
func (s *script) ok(line string) string {
	s.t.Helper()
	r := s.run(line)
	require.Equal(s.t, 0, r.status, "%s\n%s%s", line, r.out, r.err)
	return r.out
}

// play runs the commands of a document in their order. Each has a check of what its comment says; one without is an
// error, and so is a check without a command.
func (s *script) play(document string, checks map[string]func(out string)) {
	s.t.Helper()
	used := map[string]bool{}
	for line := range strings.Lines(read(s.t, filepath.Join("testdata", "seeds", document))) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		check, known := checks[line]
		require.True(s.t, known, "%s: nothing says what %q does", document, line)
		used[line] = true
		switch name, value, exported := strings.Cut(strings.TrimPrefix(line, "export "), "="); {
		case strings.HasPrefix(line, "pip install"): // the one thing that is replaced: the program is in the PATH
		case strings.HasPrefix(line, "export ") && exported:
			s.env = append(s.env, name+"="+strings.Trim(value, `"`))
		default:
			check(s.ok(line))
		}
	}
	require.Len(s.t, used, len(checks), "%s has all commands that are checked", document)
}

// mesh serves the folder on the script's database, and the script's commands talk to it.
func (s *script) mesh(database string) (stop func()) {
	s.t.Helper()
	address, p := devIn(s.t, s.dir, "--database", database, "--data", filepath.Join(s.t.TempDir(), "data"))
	s.env = append(s.env, "SPECQL_ADDRESS="+address)
	return func() { p.end(os.Interrupt) }
}

const seedsBefore = `services:
  - name: http_service
    type: api
    category: test
    operations: [{name: call, input_schema: {n: integer}}]
`

const seedsAfter = `services:
  - name: http_service
    type: api
    category: test
    execution_type: http
    runner_config: {base_url: "URL"}
    security_policy: {allow_private_networks: true}
    operations: [{name: call, input_schema: {n: integer}}]
  - name: migrated_service
    type: api
    category: test
    execution_type: http
    runner_config: {base_url: "URL", timeout: 30}
    security_policy: {allow_private_networks: true, max_response_size: 100000}
    operations: [{name: call, input_schema: {n: integer}}]
  - name: shell_service
    type: script
    category: test
    execution_type: shell
    runner_config: {working_directory: "DIR/scripts"}
    security_policy: {allowed_commands: ["/usr/bin/cat"], resource_limits: {memory_mb: 64}}
    operations: [{name: call, command: ["/usr/bin/cat"], input_schema: {n: integer}}]
  - name: problematic_service
    type: script
    category: test
    execution_type: shell
    runner_config: {working_directory: "DIR/scripts"}
    security_policy: {allowed_commands: ["/usr/bin/cat"]}
    operations: [{name: call, command: ["/usr/bin/env"]}]
  - name: docker_service
    type: container
    category: test
    execution_type: docker
    runner_config: {image: "specql/demo:local"}
    security_policy: {allowed_images: ["specql/demo:local"], resource_limits: {memory_mb: 256}}
    operations:
      - name: convert_document
        command: [convert]
        input_schema:
          $schema: https://json-schema.org/draft/2020-12/schema
          type: object
          properties: {text: {type: string, default: hello}, from: {type: string, default: txt}, to: {type: string, default: html}}
          required: [text, from, to]
`

// TestSeedsCommands takes every command of the two documents that the project began with, in their order, on a fresh
// folder with a PostgreSQL, and sees that each does what its comment says.
func TestSeedsCommands(t *testing.T) {
	if err := exec.Command("docker", "version").Run(); err != nil {
		if _, err := os.Stat("/var/run/docker.sock"); err != nil {
			t.Skip("no Docker engine is there")
		}
	}
	cluster := pgtest.Shared(t)
	admin := pgtest.Database(t)
	cluster.Psql(t, admin, "CREATE DATABASE your_database")
	database, err := url.Parse(admin)
	require.NoError(t, err)
	database.Path = "/your_database"

	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "bin"), 0o700))
	program, err := filepath.Abs(os.Args[0])
	require.NoError(t, err)
	require.NoError(t, os.Symlink(program, filepath.Join(dir, "bin", "specql")))
	for _, name := range []string{"examples/multi-execution", "migrations"} {
		require.NoError(t, os.CopyFS(filepath.Join(dir, name), os.DirFS(filepath.Join("..", "..", name))))
	}
	for _, name := range []string{"registry", "scripts"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, name), 0o755)) //nolint:gosec // shell jobs are another user
	}
	s := &script{t: t, dir: dir, env: []string{
		asProgram + "=1", "HOME=" + dir, "LANG=C.UTF-8", "TZ=UTC",
		"PATH=" + filepath.Join(dir, "bin") + ":" + cluster.Bin() + ":" + os.Getenv("PATH"),
		"PGHOST=" + database.Hostname(), "PGPORT=" + database.Port(), "PGUSER=" + database.User.Username(),
		"DATABASE_URL=" + database.String(),
		"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.org", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.org",
	}}
	registry := filepath.Join(dir, "registry", "service_registry.yaml")
	nothing := func(string) {}
	has := func(want ...string) func(string) {
		return func(out string) {
			for _, w := range want {
				require.Contains(t, out, w)
			}
		}
	}

	var stop func()
	s.play("examples.sh", map[string]func(string){
		"pip install specql": nothing,
		"cp examples/multi-execution/registry/service_registry.yaml registry/": func(string) {
			require.FileExists(t, registry)
		},
		`export STRIPE_API_KEY="sk_test_..."`: nothing,
		`export SENDGRID_API_KEY="SG...."`:    nothing,
		"specql generate-schema examples/multi-execution/entities/": func(out string) {
			has(`CREATE TABLE`, "payment", "prediction")(out)
			s.ok("specql migrate-schema")
			cluster.Psql(t, database.String(), out)
			stop = s.mesh(database.String())
		},
		"specql execute-job --entity payment --action process_payment":   has(`"status"`),
		"specql execute-job --entity report --action generate_pdf":       has("{"),
		"specql execute-job --entity prediction --action classify_image": has(`"label"`),
	})
	stop()

	remote := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"ok":true}`)) }))
	t.Cleanup(remote.Close)
	write := func(text string) {
		text = strings.ReplaceAll(strings.ReplaceAll(text, "URL", remote.URL), "DIR", dir)
		require.NoError(t, os.WriteFile(registry, []byte(text), 0o600))
		s.ok("git add registry && git commit -qm registry")
	}
	s.ok("git init -q")
	write(seedsBefore)
	valid := has("The schema is what this version needs.")
	load := func(out string) {
		require.Regexp(t, `(?i)p99|latency`, out)
		require.NotContains(t, out, "no call succeeded")
	}
	count := func(where string) string {
		return cluster.Psql(t, database.String(), "SELECT count(*) FROM jobs.tb_job_run WHERE "+where)
	}
	s.play("migration.sh", map[string]func(string){
		"pip install specql>=2.0.0":                             nothing,
		"specql --version":                                      has("specql"),
		"specql migrate-schema":                                 has("up to date"), // it was made for the examples already
		"specql validate-schema":                                valid,
		"specql validate-config registry/service_registry.yaml": has("is valid"),
		"specql migration-check registry/service_registry.yaml": func(out string) {
			has("execution_type")(out)
			write(seedsAfter)
			stop = s.mesh(database.String())
			for range 3 {
				s.run(`printf 'actions:\n  - call_service: {service: problematic_service, operation: call}\n' > w.yaml; specql execute-job --file w.yaml`)
			}
			require.Equal(t, "3", count("service_name = 'problematic_service' AND error_code = 'POLICY_VIOLATION'"))
			s.ok("specql load-test --service migrated_service --requests 40")
		},
		"specql load-test --service http_service --concurrency 100":             load,
		"specql load-test --service shell_service --concurrency 50":             load,
		"specql benchmark --services http_service shell_service docker_service": has("http_service", "shell_service", "docker_service"),
		"specql execution-types --disable shell docker serverless": func(out string) {
			require.Regexp(t, `(?m)^shell +disabled`, out)
			require.Regexp(t, `(?m)^http +enabled`, out)
		},
		"specql rollback --to http-only": func(out string) {
			require.Regexp(t, `(?m)^docker +disabled`, out)
			require.NotEqual(t, 0, s.run("specql load-test --service shell_service --requests 1").status)
			require.NotEqual(t, "0", count("error_code = 'DISABLED'"))
			s.ok("specql load-test --service http_service --requests 1")
		},
		"git checkout HEAD~1 registry/service_registry.yaml": func(string) {
			require.Equal(t, seedsBefore, read(t, registry))
		},
		"specql check-permissions": has("may do all"),
		"psql -d your_database -f migrations/001_multi_execution.sql": func(out string) {
			require.NotContains(t, out, "ERROR")
		},
		"specql validate-config registry/service_registry.yaml --verbose": has("is valid", "service http_service (http): call"),
		"specql resource-check --service migrated_service":                has("migrated_service"),
		"specql security-audit --service problematic_service":             has("/usr/bin/env", "allowed_commands"),
		"specql profile --service migrated_service":                       has("runner"),
	})
	stop()
	// The queries of the documents run, too.
	for _, name := range []string{"examples.sql", "migration.sql"} {
		out := cluster.Psql(t, database.String(), read(t, filepath.Join("testdata", "seeds", name)))
		require.Contains(t, out, "http", name)
	}
}

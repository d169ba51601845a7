package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/test/pgtest"
)

// asProgram makes the test binary be specql.
const asProgram = "SPECQL_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	status := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		_, _ = os.Stderr.WriteString(err.Error() + "\n")
		status = max(status, 1)
	}
	os.Exit(status)
}

// program is a command that runs specql in a folder, with little else in its environment.
func program(ctx context.Context, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Dir = dir
	cmd.Env = []string{asProgram + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + dir, "LANG=C.UTF-8", "TZ=UTC"}
	// What the go command has compiled is not compiled again.
	if cache, err := os.UserCacheDir(); err == nil {
		cmd.Env = append(cmd.Env, "XDG_CACHE_HOME="+cache)
	}
	if cache := os.Getenv("GOCACHE"); cache != "" {
		cmd.Env = append(cmd.Env, "GOCACHE="+cache)
	}
	return cmd
}

type result struct {
	status   int
	out, err string
}

func specql(t *testing.T, dir string, args ...string) result { return specqlIn(t, dir, nil, args...) }

func specqlIn(t *testing.T, dir string, in io.Reader, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := program(t.Context(), dir, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(t, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func project(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("testdata/project")
	require.NoError(t, err)
	return dir
}

var readyLine = regexp.MustCompile(`^ready api=(127\.0\.0\.1:\d+) console=(127\.0\.0\.1:\d+)$`)

// process is a specql that runs.
type process struct {
	cmd  *exec.Cmd
	err  *said
	done chan struct{}
}

// said is what a process has written so far.
type said struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// match waits until the process has written what the pattern says.
func (s *said) match(t *testing.T, pattern string) []string {
	t.Helper()
	var found []string
	require.Eventually(t, func() bool {
		found = regexp.MustCompile(pattern).FindStringSubmatch(s.String())
		return found != nil
	}, 10*time.Second, 10*time.Millisecond, pattern)
	return found
}

// dev starts the mesh on the test project and returns its address.
func dev(t *testing.T, args ...string) (address string, p *process) {
	t.Helper()
	return devIn(t, project(t), append([]string{"--data", filepath.Join(t.TempDir(), "data")}, args...)...)
}

func devIn(t *testing.T, dir string, args ...string) (address string, p *process) {
	t.Helper()
	return devWith(t, dir, nil, args...)
}

// devWith is devIn with more in the mesh's environment.
func devWith(t *testing.T, dir string, env []string, args ...string) (address string, p *process) {
	t.Helper()
	cmd := program(context.WithoutCancel(t.Context()), dir, append([]string{"dev", "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0"}, args...)...)
	cmd.Env = append(cmd.Env, env...)
	p = &process{cmd: cmd, err: &said{}, done: make(chan struct{})}
	cmd.Stderr = p.err
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { p.end(syscall.SIGKILL) })
	lines := bufio.NewScanner(out)
	ok := lines.Scan()
	go func() {
		defer close(p.done)
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	}()
	if !ok {
		<-p.done
		require.FailNow(t, "dev ended", p.err.String())
	}
	match := readyLine.FindStringSubmatch(lines.Text())
	require.NotNil(t, match, lines.Text())
	return match[1], p
}

// end signals the process and returns its exit status.
func (p *process) end(s os.Signal) int {
	_ = p.cmd.Process.Signal(s)
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

type run struct {
	ID     string          `json:"id"`
	Status string          `json:"status"`
	Output json.RawMessage `json:"output"`
	Error  *struct{ Code, Message string }
	Jobs   []struct {
		ID, Service, Operation, ExecutionType, Status string
		Attempts                                      int
		ResourceUsage                                 map[string]any
		SecurityContext                               map[string]any
		Error                                         *struct{ Code string }
	}
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	require.NoError(t, json.Unmarshal([]byte(text), &v), text)
	return v
}

func TestARunsLife(t *testing.T) {
	address, p := dev(t)
	at := func(args ...string) []string { return append(args, "--address", address) }
	dir := t.TempDir()

	t.Run("execute-job", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "echo", "--input", `{"text":"hi"}`)...)
		require.Equal(t, 0, r.status, r.err)
		require.JSONEq(t, `{"said": "hi"}`, r.out, "the result and nothing else")
		require.Regexp(t, `^run \S+ note\.echo running\n(?s:.+)\nsteps\[0\] machine\.echo completed in .+\nrun \S+ completed in .+\n$`, r.err)
		require.Contains(t, r.err, `machine.echo | {"text":"hi"}`)
		require.Equal(t, 2, strings.Count(r.err, "\nrun ")+strings.Count(r.err, " note.echo running"), r.err)
		require.NotContains(t, r.err+r.out, "\x1b", "no colours where there is no terminal")
	})
	t.Run("json", func(t *testing.T) {
		r := specqlIn(t, dir, strings.NewReader(`{"text":"from stdin"}`), at("execute-job", "--entity", "note", "--action", "echo", "--input", "-", "-o", "json", "--quiet")...)
		require.Equal(t, 0, r.status, r.err)
		require.Empty(t, r.err)
		got := decode[run](t, r.out)
		require.Equal(t, "completed", got.Status)
		require.JSONEq(t, `{"said":"from stdin"}`, string(got.Output))
		require.Nil(t, got.Error)
		require.Len(t, got.Jobs, 1)
		require.Equal(t, "shell", got.Jobs[0].ExecutionType)
		require.Equal(t, 1, got.Jobs[0].Attempts)
		require.Contains(t, got.Jobs[0].ResourceUsage, "durationSeconds")
		require.Contains(t, got.Jobs[0].SecurityContext, "policyDigest")

		show := specql(t, dir, at("runs", "show", got.ID, "-o", "json")...)
		require.Equal(t, 0, show.status)
		require.JSONEq(t, r.out, show.out)
		show = specql(t, dir, at("runs", "show", got.ID)...)
		require.Equal(t, 0, show.status)
		require.Contains(t, show.out, "✓ machine.echo")
		require.Contains(t, show.out, "PEAK MEMORY")
	})
	t.Run("failure", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "fail", "--output", "json")...)
		require.Equal(t, 1, r.status)
		got := decode[run](t, r.out)
		require.Equal(t, "failed", got.Status)
		require.Equal(t, "REMOTE_ERROR", got.Error.Code)
		require.Contains(t, got.Error.Message, "broken")
		require.Equal(t, "REMOTE_ERROR", got.Jobs[0].Error.Code)
		r = specql(t, dir, at("execute-job", "--entity", "note", "--action", "fail")...)
		require.Equal(t, 1, r.status)
		require.Empty(t, r.out, "there is no result")
		require.Regexp(t, `\nrun \S+ failed in .+: REMOTE_ERROR: .+broken`, r.err)
	})
	t.Run("workflow file", func(t *testing.T) {
		file := filepath.Join(dir, "w.yaml")
		require.NoError(t, os.WriteFile(file, []byte("actions:\n  - call_service: {service: machine, operation: echo, input: {n: 7}}\n"), 0o600))
		r := specql(t, dir, at("execute-job", "--file", "w.yaml", "-o", "json")...)
		require.Equal(t, 0, r.status, r.err)
		require.JSONEq(t, `{"n":7}`, string(decode[run](t, r.out).Output))
	})
	t.Run("workflow file with problems", func(t *testing.T) {
		file := filepath.Join(dir, "bad.yaml")
		require.NoError(t, os.WriteFile(file, []byte("actions:\n  - call_service: {service: machine, operation: echo, inptu: {n: 7}}\n  - foo: 1\n"), 0o600))
		r := specql(t, dir, at("execute-job", "--file", "bad.yaml")...)
		require.Equal(t, 2, r.status, r.err)
		require.Contains(t, r.err, "specql: bad.yaml:2:55: ")
		require.Contains(t, r.err, "\n  bad.yaml:3:5: ")
		require.NotContains(t, r.err, "workflow:")
		require.NoError(t, os.WriteFile(file, []byte(" \n"), 0o600))
		r = specql(t, dir, at("execute-job", "--file", "bad.yaml")...)
		require.Equal(t, 2, r.status, r.err)
		require.Contains(t, r.err, "bad.yaml is empty")
	})
	t.Run("hostile text", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "hostile")...)
		require.Equal(t, 0, r.status, r.err)
		require.NotContains(t, r.out+r.err, "\x1b")
		require.NotContains(t, r.out+r.err, "\a")
		require.NotContains(t, r.out+r.err, "\u202e")
		require.Contains(t, r.err, `\x1b[2J`)
	})
	t.Run("detach, cancel, logs, list", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "sleep", "--detach")...)
		require.Equal(t, 0, r.status, r.err)
		id := strings.TrimSpace(r.out)
		require.Eventually(t, func() bool {
			running := specql(t, dir, at("runs", "list", "--status", "running", "-o", "json")...)
			return len(decode[struct{ Runs []run }](t, running.out).Runs) == 1
		}, 10*time.Second, 50*time.Millisecond)
		r = specql(t, dir, at("runs", "cancel", id, "--reason", "enough")...)
		require.Equal(t, 0, r.status, r.err)
		require.Equal(t, "run "+id+" cancelled\n", r.out)
		r = specql(t, dir, at("runs", "show", id, "-o", "json")...)
		got := decode[run](t, r.out)
		require.Equal(t, "cancelled", got.Status)
		require.Equal(t, "CANCELLED", got.Error.Code)
		require.Contains(t, got.Error.Message, "enough")
		r = specql(t, dir, at("runs", "list", "--page", "odd")...)
		require.Equal(t, 2, r.status)
		require.Contains(t, r.err, `--page "odd" is not the nextPageToken`)
		r = specql(t, dir, at("runs", "list", "--entity", "note", "--action", "sleep")...)
		require.Equal(t, 0, r.status)
		require.Contains(t, r.out, id)
		require.Contains(t, r.out, "cancelled")
		r = specql(t, dir, at("runs", "cancel", id)...)
		require.NotEqual(t, 0, r.status, "it has ended")
	})
	t.Run("logs", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "fail", "-o", "json", "-q")...)
		id := decode[run](t, r.out).ID
		r = specql(t, dir, at("runs", "logs", id)...)
		require.Equal(t, 0, r.status, r.err)
		require.Equal(t, "machine.fail | broken\n", r.out)
		r = specql(t, dir, at("runs", "logs", id, "-o", "json")...)
		logs := decode[struct {
			Lines []struct{ Text, Stream string }
		}](t, r.out)
		require.Len(t, logs.Lines, 1)
		require.Equal(t, "stderr", logs.Lines[0].Stream)
	})
	t.Run("retry", func(t *testing.T) {
		input := `{"marker":"` + filepath.Join(dir, "marker") + `"}`
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "once", "--input", input, "-o", "json", "-q")...)
		require.Equal(t, 1, r.status, r.err)
		r = specql(t, dir, at("runs", "retry", decode[run](t, r.out).ID, "-o", "json")...)
		require.Equal(t, 0, r.status, r.err)
		require.Equal(t, "completed", decode[run](t, r.out).Status)
	})
	t.Run("signal", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "note", "--action", "approve", "--detach")...)
		id := strings.TrimSpace(r.out)
		r = specql(t, dir, at("runs", "signal", id, "approved", "--payload", `{"by":"Ada"}`)...)
		require.Equal(t, 0, r.status, r.err)
		require.Eventually(t, func() bool {
			r = specql(t, dir, at("runs", "show", id, "-o", "json")...)
			return decode[run](t, r.out).Status == "completed"
		}, 10*time.Second, 50*time.Millisecond)
		require.JSONEq(t, `{"by":"Ada"}`, string(decode[run](t, r.out).Output))
	})
	t.Run("interrupt cancels", func(t *testing.T) {
		cmd := program(t.Context(), dir, at("execute-job", "--entity", "note", "--action", "sleep", "-o", "json")...)
		var out bytes.Buffer
		cmd.Stdout = &out
		errs, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		lines := bufio.NewScanner(errs)
		for lines.Scan() && !strings.Contains(lines.Text(), "| sleeping") {
		}
		require.NoError(t, cmd.Process.Signal(os.Interrupt))
		rest, err := io.ReadAll(errs)
		require.NoError(t, err)
		require.Error(t, cmd.Wait())
		require.Equal(t, 1, cmd.ProcessState.ExitCode())
		require.Contains(t, string(rest), "cancelling the run")
		require.Equal(t, "cancelled", decode[run](t, out.String()).Status)
	})
	t.Run("runners", func(t *testing.T) {
		r := specql(t, dir, at("runners")...)
		require.Equal(t, 0, r.status, r.err)
		for _, name := range []string{"http-runner", "shell-runner", "docker-runner", "serverless-runner"} {
			require.Contains(t, r.out, name)
		}
		r = specql(t, dir, at("runners", "-o", "json")...)
		got := decode[struct {
			Runners []struct {
				ExecutionType string
				Reachable     bool
			}
		}](t, r.out)
		require.Len(t, got.Runners, 4)
		require.True(t, got.Runners[0].Reachable)
	})
	t.Run("invalid input", func(t *testing.T) {
		r := specql(t, dir, at("execute-job", "--entity", "notes", "--action", "echo")...)
		require.Equal(t, 2, r.status)
		require.Contains(t, r.err, "note")
		r = specql(t, dir, at("execute-job", "--entity", "note", "--action", "echo", "--input", `{"text": 1}`)...)
		require.Equal(t, 2, r.status, r.err)
	})
	require.Equal(t, 0, p.end(syscall.SIGTERM), p.err.String())
}

func TestMisuse(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"bogus"}, `unknown command "bogus"`},
		{[]string{"runs", "bogus"}, `unknown command "bogus"`},
		{[]string{"completion", "zhs"}, `unknown command "zhs"`},
		{[]string{"help", "bogus"}, `unknown command "bogus"`},
		{[]string{"runs", "show"}, "accepts 1 arg"},
		{[]string{"runs", "list", "--limit", "0"}, "--limit must be between 1 and 1000"},
		{[]string{"runs", "list", "--limit", "-5"}, "--limit must be between 1 and 1000"},
		{[]string{"runs", "list", "--status", "odd"}, "completed"},
		{[]string{"runs", "list", "-o", "yaml"}, "text or json"},
		{[]string{"execute-job"}, "--entity"},
		{[]string{"execute-job", "--bogus"}, "unknown flag"},
		{[]string{"execute-job", "--entity", "e", "--action", "a", "--file", "f"}, "--file"},
		{[]string{"execute-job", "--file", "none.yaml"}, "no such file"},
		{[]string{"execute-job", "--entity", "e", "--action", "a", "--input", "{"}, "not JSON"},
		{[]string{"execute-job", "--entity", "e", "--action", "a", "--input", "@none"}, "no such file"},
		{[]string{"execute-job", "--entity", "e", "--action", "a", "--input", "[1]"}, "JSON object"},
		{[]string{"execute-job", "--entity", "e", "--action", "a", "--address", "http://x"}, "URL"},
		{[]string{"dev", "--listen", "0.0.0.0:0"}, "not a loopback address"},
		{[]string{"dev", "--registry", "none.yaml"}, "no such file"},
		{[]string{"dev", "--log-level", "loud"}, "loud"},
		{[]string{"dev", "--runner", "wasm"}, "TYPE=ADDRESS"},
		{[]string{"dev", "--runner", "wasm=127.0.0.1:1,wasm=127.0.0.1:2"}, "given twice"},
		{[]string{"certs"}, "accepts 1 arg"},
		{[]string{"certs", "certs", "--host", "mesh:7350"}, "neither a name"},
		{[]string{"validate-config"}, "accepts 1 arg"},
		{[]string{"validate-config", "none.yaml"}, "no such file"},
		{[]string{"validate-config", project(t) + "/registry/service_registry.yaml", "--runner", "wasm=192.0.2.1:9"}, "loopback"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			r := specql(t, dir, tt.args...)
			require.Equal(t, 2, r.status, r.err)
			require.Contains(t, r.err, tt.want)
			require.Empty(t, r.out)
		})
	}
}

func TestNoServer(t *testing.T) {
	r := specql(t, t.TempDir(), "execute-job", "--entity", "e", "--action", "a", "--address", "127.0.0.1:1")
	require.Equal(t, 1, r.status)
	require.Contains(t, r.err, "specql dev")
}

func TestVersionHelpAndCompletion(t *testing.T) {
	r := specql(t, t.TempDir(), "--version")
	require.Equal(t, 0, r.status)
	require.Regexp(t, `^specql version \S+\n$`, r.out)
	r = specql(t, t.TempDir(), "completion", "bash")
	require.Equal(t, 0, r.status)
	require.Contains(t, r.out, "specql")
	for _, args := range [][]string{{"--help"}, {"help"}} {
		r = specql(t, t.TempDir(), args...)
		require.Equal(t, 0, r.status)
		require.Contains(t, r.out, "execute-job")
	}
	for want, args := range map[string][]string{"powershell": {"completion"}, "--limit": {"help", "runs", "list"}} {
		r = specql(t, t.TempDir(), args...)
		require.Equal(t, 0, r.status, r.err)
		require.Contains(t, r.out, want)
	}
}

func TestValidateConfig(t *testing.T) {
	good := filepath.Join(project(t), "registry", "service_registry.yaml")
	r := specql(t, t.TempDir(), "validate-config", good, "--entities", filepath.Join(project(t), "entities"))
	require.Equal(t, 0, r.status, r.out+r.err)
	require.Contains(t, r.out, "is valid")
	r = specql(t, t.TempDir(), "validate-config", good, "-o", "json")
	require.Equal(t, 0, r.status)
	require.JSONEq(t, `{"valid": true, "problems": []}`, r.out)

	type report struct {
		Valid    bool
		Problems []struct {
			File, Path, Message, Mend string
			Line, Column              int
			Warning                   bool
		}
	}
	bad, err := filepath.Abs("testdata/bad.yaml")
	require.NoError(t, err)
	r = specql(t, t.TempDir(), "validate-config", bad, "--output", "json")
	require.Equal(t, 2, r.status)
	got := decode[report](t, r.out)
	require.False(t, got.Valid)
	lines := map[int]string{}
	for _, p := range got.Problems {
		lines[p.Line] += p.Message + "; " + p.Mend + "\n"
	}
	require.Contains(t, lines[7], "string")
	require.Contains(t, lines[8], "environment")
	require.Contains(t, lines[9], "operations")
	r = specql(t, t.TempDir(), "validate-config", bad, "--verbose")
	require.Equal(t, 2, r.status)
	require.Contains(t, r.out, bad+":8:7: error: ")
	require.Contains(t, r.out, "          envirnment: {}\n          ^\n")
	require.Contains(t, r.out, "is not valid: ")
}

func TestValidateConfigAsksACustomRunner(t *testing.T) {
	address := customRunner(t)
	file := filepath.Join(t.TempDir(), "registry.yaml")
	write := func(key string) {
		require.NoError(t, os.WriteFile(file, []byte("services:\n  - name: c\n    type: t\n    category: c\n    execution_type: custom\n"+
			"    runner_config: {"+key+": x}\n    operations: [{name: o}]\n"), 0o600))
	}
	write("greeting")
	r := specql(t, t.TempDir(), "validate-config", file, "--runner", "custom="+address, "--insecure")
	require.Equal(t, 0, r.status, r.out+r.err)
	write("greting")
	r = specql(t, t.TempDir(), "validate-config", file, "--runner", "custom="+address)
	require.Equal(t, 2, r.status, r.out+r.err)
	require.Contains(t, r.out, `"greeting"`)
	r = specql(t, t.TempDir(), "validate-config", file)
	require.Equal(t, 2, r.status, "no runner serves the type")
	require.Contains(t, r.out, "custom")
}

func TestDevServesACustomRunner(t *testing.T) {
	address := customRunner(t)
	dir := t.TempDir()
	registry := filepath.Join(dir, "registry.yaml")
	require.NoError(t, os.WriteFile(registry, []byte("services:\n  - name: c\n    type: t\n    category: c\n    execution_type: custom\n"+
		"    runner_config: {greeting: hello}\n    operations: [{name: o}]\n"), 0o600))
	workflow := filepath.Join(dir, "w.yaml")
	require.NoError(t, os.WriteFile(workflow, []byte("actions:\n  - call_service: {service: c, operation: o}\n"), 0o600))
	api, p := devIn(t, dir, "--registry", "registry.yaml", "--runner", "custom="+address)
	r := specql(t, dir, "execute-job", "--file", workflow, "--address", api, "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.JSONEq(t, `"hello"`, string(decode[run](t, r.out).Output))
	require.Equal(t, 0, p.end(os.Interrupt))
	info, err := os.Stat(filepath.Join(dir, ".specql"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), info.Mode().Perm())
}

func TestDevRefusesWhatCannotWork(t *testing.T) {
	bad, err := filepath.Abs("testdata/bad.yaml")
	require.NoError(t, err)
	r := specql(t, t.TempDir(), "dev", "--registry", bad, "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0")
	require.Equal(t, 2, r.status)
	require.Contains(t, r.err, "bad.yaml:8:7")
	require.Empty(t, r.out, "it is not ready")

	data := filepath.Join(t.TempDir(), "data")
	_, p := devIn(t, project(t), "--data", data)
	r = specql(t, project(t), "dev", "--data", data, "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0")
	require.Equal(t, 1, r.status, r.err)
	require.Contains(t, r.err, "in use by process")
	api := p.err.match(t, `api +(\S+)`)
	r = specql(t, project(t), "dev", "--data", filepath.Join(t.TempDir(), "data"), "--listen", api[1])
	require.Equal(t, 1, r.status)
	require.Contains(t, r.err, "in use")
}

// greeter is a custom runner.
type greeter struct{}

type greeterConfig struct {
	Greeting string `json:"greeting"`
}

func (greeter) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "greeter", Types: []runner.Type{{
		Name: "custom", ConfigSchema: runner.SchemaOf[greeterConfig](), PolicySchema: runner.SchemaOf[struct{}](), OperationSchema: runner.SchemaOf[struct{}](),
	}}}, nil
}

func (greeter) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	return runner.CheckService[greeterConfig, struct{}, struct{}](s), nil
}

func (greeter) Execute(_ context.Context, job *runner.Job, _ runner.Sink) (*runner.Result, error) {
	c, err := runner.Decode[greeterConfig](job.Service.Config)
	if err != nil {
		return &runner.Result{Err: err}, nil
	}
	out, err := json.Marshal(c.Greeting)
	return &runner.Result{Output: out}, err
}

func customRunner(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- runner.Serve(ctx, lis, greeter{}, nil, runner.Options{}) }()
	t.Cleanup(func() { cancel(); assert.NoError(t, <-ended) })
	return lis.Addr().String()
}

func TestExamples(t *testing.T) {
	dir := t.TempDir() // an empty folder: the bundled examples are served
	address, p := devIn(t, dir)
	p.err.match(t, `sandbox +http://\S+ stands in for Stripe`)
	for _, args := range [][]string{
		{"--entity", "payment", "--action", "process_payment"},
		{"--entity", "report", "--action", "generate_pdf"},
		{"--entity", "email", "--action", "send_email"},
		{"--entity", "file", "--action", "upload_file"},
		{"--entity", "thumbnail", "--action", "resize"},
		{"--entity", "analysis", "--action", "analyze"},
		{"--entity", "notification", "--action", "send_notification"},
	} {
		r := specql(t, dir, append([]string{"execute-job", "--address", address, "-q"}, args...)...)
		require.Equal(t, 0, r.status, "%v: %s %s", args, r.out, r.err)
	}
	r := specql(t, dir, "execute-job", "--address", address, "--entity", "prediction", "--action", "classify_image", "-q", "-o", "json")
	if strings.Contains(p.err.String(), "no Docker engine answers") {
		require.Equal(t, "UNAVAILABLE", decode[run](t, r.out).Error.Code)
	} else {
		require.Equal(t, 0, r.status, r.out)
	}
	r = specql(t, dir, "validate-config", ".specql/examples/registry/service_registry.yaml", "--entities", ".specql/examples/entities", "--env", "production")
	require.Equal(t, 0, r.status, r.out)
}

func TestDemo(t *testing.T) {
	rows := func(out string) map[string][]string {
		got := map[string][]string{}
		for line := range strings.Lines(out) {
			if cells := regexp.MustCompile(` {2,}`).Split(strings.TrimSpace(line), -1); len(cells) == 8 {
				got[cells[1]] = cells
			}
		}
		return got
	}
	r := specql(t, t.TempDir(), "demo")
	require.Equal(t, 0, r.status, r.err)
	table := rows(r.out)
	for _, kind := range []string{"http", "shell", "serverless", "docker"} {
		require.Contains(t, table, kind, r.out)
	}
	require.Contains(t, r.out, "(on failure)")

	cmd := program(t.Context(), t.TempDir(), "demo")
	cmd.Env = append(cmd.Env, "DOCKER_HOST=unix:///nowhere/docker.sock")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Run(), errs.String())
	require.Contains(t, errs.String(), "no Docker engine answers")
	require.Equal(t, "skipped: no Docker engine answers", rows(out.String())["docker"][2], out.String())
}

package shellrunner

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// discard is a sink that nobody reads.
type discard struct{}

func (discard) Log(string, string)            {}
func (discard) Usage(*runnerv1.ResourceUsage) {}
func (discard) Secret(string)                 {}

// shell is a runner behind a real connection.
type shell struct {
	t      *testing.T
	r      *Runner
	client runnerv1.RunnerServiceClient
	jobs   int
}

func newRunner(t testing.TB, o Options) *Runner {
	t.Helper()
	if o.TempDir == "" {
		o.TempDir = t.TempDir()
	}
	r, err := New(o)
	require.NoError(t, err)
	t.Cleanup(func() {
		left, err := os.ReadDir(r.temp)
		require.NoError(t, err)
		require.Empty(t, left, "private directories are removed")
		require.NoError(t, r.Close())
		require.NoDirExists(t, r.temp)
	})
	return r
}

func newShell(t *testing.T, o Options) *shell {
	t.Helper()
	r := newRunner(t, o)
	return &shell{t: t, r: r, client: runnertest.Start(t, r)}
}

// newShellWithout has no control groups.
func newShellWithout(t *testing.T, o Options) *shell {
	t.Helper()
	o.without = append(o.without, isolationCgroup)
	r := newRunner(t, o)
	return &shell{t: t, r: r, client: runnertest.Start(t, r)}
}

// spaces are what to leave away for a job without name spaces.
func spaces(bare bool) []string {
	if bare {
		return []string{sandbox.UserNamespace}
	}
	return nil
}

// withAndWithout runs a test with control groups, where there are any, and without, and both
// with name spaces, where they can be had, and without.
func withAndWithout(t *testing.T, test func(t *testing.T, s *shell)) {
	t.Helper()
	for _, bare := range []bool{false, true} {
		name := map[bool]string{false: ", name spaces", true: ", no name spaces"}[bare]
		t.Run("control groups"+name, func(t *testing.T) {
			s := newShell(t, Options{without: spaces(bare)})
			requireGroups(t, s)
			require.Equal(t, !bare, s.r.box.contained())
			test(t, s)
		})
		t.Run("no control groups"+name, func(t *testing.T) { test(t, newShellWithout(t, Options{without: spaces(bare)})) })
	}
}

// call is a job in the terms of the registry.
type call struct {
	Config    Config
	Policy    Policy
	Operation Operation
	Name      string
	Input     any
}

func (s *shell) job(c call) *runnerv1.Job {
	s.t.Helper()
	s.jobs++
	if c.Name == "" {
		c.Name = "operation"
	}
	if c.Input == nil {
		c.Input = map[string]any{}
	}
	return &runnerv1.Job{
		Id: "job-" + strings.ReplaceAll(s.t.Name(), "/", "-") + "-" + strconv.Itoa(s.jobs), RunId: "run-1", Attempt: 1, IdempotencyKey: "key-1",
		Service:   &runnerv1.Service{Name: "s", ExecutionType: Type, RunnerConfig: raw(s.t, c.Config), SecurityPolicy: raw(s.t, c.Policy)},
		Operation: &runnerv1.Operation{Name: c.Name, Config: raw(s.t, c.Operation)},
		Input:     raw(s.t, c.Input),
	}
}

func raw(t testing.TB, v any) []byte {
	t.Helper()
	if r, ok := v.(json.RawMessage); ok {
		return r
	}
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

func (s *shell) run(c call) *runnertest.Outcome {
	s.t.Helper()
	o := runnertest.Execute(s.t, s.client, s.job(c))
	require.NoError(s.t, o.Err)
	require.NotNil(s.t, o.Finished)
	u := o.Finished.GetUsage()
	require.Positive(s.t, u.GetDurationSeconds())
	require.NotEmpty(s.t, u.GetSource())
	require.NotEmpty(s.t, o.Finished.GetSecurity().GetPolicyDigest())
	return o
}

// ok runs a job that must succeed and gives its output.
func (s *shell) ok(c call) map[string]any {
	s.t.Helper()
	o := s.run(c)
	require.Nil(s.t, o.Finished.GetError(), "%v", o.Finished.GetError())
	return output(s.t, o)
}

func output(t testing.TB, o *runnertest.Outcome) map[string]any {
	t.Helper()
	var v map[string]any
	require.NoError(t, json.Unmarshal(o.Finished.GetOutput(), &v))
	return v
}

// fails runs a job that must fail with a code and texts in its message.
func (s *shell) fails(c call, code string, texts ...string) *runnertest.Outcome {
	s.t.Helper()
	o := s.run(c)
	require.Equal(s.t, code, o.Code(), "%v %s", o.Finished.GetError(), o.Finished.GetOutput())
	for _, text := range texts {
		require.Contains(s.t, o.Finished.GetError().GetMessage(), text)
	}
	require.False(s.t, o.Finished.GetError().GetRetryable() && code != "TIMEOUT")
	return o
}

// tools are what the tests' shell lines execute: what a command executes must be allowed itself.
var tools = []string{
	"/bin/sh", "/bin/cat", "/bin/chmod", "/bin/dd", "/bin/ln", "/bin/ls", "/bin/mkdir", "/bin/sleep", "/usr/bin/env", "/usr/bin/find", "/usr/bin/grep", "/usr/bin/head",
	"/usr/bin/mkfifo", "/usr/bin/readlink", "/usr/bin/setsid", "/usr/bin/tr", "/usr/bin/yes",
}

// sh is a call of a shell line, which the test writes and no input gets into.
func sh(line string) call {
	return call{Policy: Policy{AllowedCommands: tools}, Operation: Operation{Command: []string{"/bin/sh", "-c", line}}}
}

// in has the command run in a directory.
func (c call) in(dir string) call {
	c.Config.WorkingDirectory = dir
	return c
}

func (c call) with(l Limits) call {
	c.Policy.ResourceLimits = l
	return c
}

func file(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o700))
	return path
}

func fifo(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, syscall.Mkfifo(path, 0o600))
	return path
}

// pidFrom reads the number that a process has in its job from a fifo, and gives the one that it
// has here.
func pidFrom(t testing.TB, fifo string) int {
	t.Helper()
	data, err := os.ReadFile(fifo)
	require.NoError(t, err)
	inside := strings.TrimSpace(string(data))
	var found []int
	all := processes()
	for pid := range all {
		status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
		if err != nil || !descends(all, pid) {
			continue
		}
		_, after, _ := strings.Cut(string(status), "\nNSpid:")
		line, _, _ := strings.Cut(after, "\n")
		if numbers := strings.Fields(line); len(numbers) > 0 && numbers[len(numbers)-1] == inside && pid != os.Getpid() {
			found = append(found, pid)
		}
	}
	require.Len(t, found, 1, "processes that are %s in their job", inside)
	return found[0]
}

// descends tells whether a process comes from this one.
func descends(all map[int]processInfo, pid int) bool {
	for range 100 {
		if pid == os.Getpid() {
			return true
		}
		p, ok := all[pid]
		if !ok {
			return false
		}
		pid = p.parent
	}
	return false
}

// requireNone fails if a process that comes from this one has a text in its command line.
func requireNone(t testing.TB, text string) {
	t.Helper()
	all := processes()
	for pid, p := range all {
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if err == nil && p.state != 'Z' && pid != os.Getpid() && descends(all, pid) {
			require.NotContains(t, strings.ReplaceAll(string(line), "\x00", " "), text)
		}
	}
}

// requireGone fails if a process is alive; one that nobody has reaped yet is not.
func requireGone(t testing.TB, pid int) {
	t.Helper()
	p, ok := processes()[pid]
	require.True(t, !ok || p.state == 'Z' || p.state == 'X', "process %d is alive: %c", pid, p.state)
}

func TestConformance(t *testing.T) {
	r := newRunner(t, Options{})
	s := &shell{t: t, r: r}
	good := s.job(call{Policy: Policy{AllowedCommands: []string{"/bin/cat"}}, Operation: Operation{Command: []string{"/bin/cat"}}, Input: map[string]any{"a": 1}})
	runnertest.Conformance(t, r, runnertest.Cases{
		Good: good,
		Check: func(t *testing.T, o *runnertest.Outcome) {
			t.Helper()
			require.JSONEq(t, `{"a":1}`, string(o.Finished.GetOutput()))
			require.Equal(t, []string{`{"a":1}`}, o.Lines("stdout"))
			require.EqualValues(t, 0, o.Finished.GetUsage().GetExitCode())
		},
		Slow:     s.job(sh(`setsid sh -c 'echo up; exec sleep 54321' & wait`)),
		SlowLine: "up",
		Gone:     func(t *testing.T) { t.Helper(); requireNone(t, "sleep 54321") },
		Big:      s.job(sh(`exec yes 0123456789`)),
	})
}

func TestArgumentsStayArguments(t *testing.T) {
	s := newShell(t, Options{})
	hostile := "a b'c\"d $(id) `id` ; rm -rf / | & > < * ? ~ \\ \n\t é"
	out := s.ok(call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/printf"}},
		Operation: Operation{Command: []string{"/usr/bin/printf", "%s|", "$input.text", "x=$input.text", "$input.n", "$input.list[1]", "$input.o", "$inputs", "$$input.text", "$1", "", "$input.no"}},
		Input:     json.RawMessage(`{"text":` + string(raw(t, hostile)) + `,"n":12345678901234567890.10,"list":[1,"two"],"o":{"a":"<&>"},"no":false}`),
	})
	require.Equal(t, hostile+"|x="+hostile+`|12345678901234567890.10|two|{"a":"<&>"}|$inputs|$input.text|$1||false|`, out["stdout"])
}

func TestReferencesThatAreNotThere(t *testing.T) {
	s := newShell(t, Options{})
	for ref, text := range map[string]string{
		"$input.nope":              `has no field "nope"; the fields there are: list, s`,
		"$input.s.x":               "$input.s is not an object but a string",
		"$input.list[7]":           "$input.list has 1 items",
		"$input.s[0]":              "$input.s is not a list",
		"$input.list[99999999999]": "is not a position",
		"$input.list[0":            "is not a position",
	} {
		c := call{
			Policy:    Policy{AllowedCommands: []string{"/bin/echo"}},
			Operation: Operation{Command: []string{"/bin/echo", ref}}, Input: map[string]any{"s": "x", "list": []int{1}},
		}
		s.fails(c, "VALIDATION", "command[1]", text)
	}
	s.fails(call{
		Policy:    Policy{AllowedCommands: []string{"/bin/echo"}},
		Operation: Operation{Command: []string{"/bin/echo", "$input.s"}}, Input: map[string]any{"s": "a\x00b"},
	}, "VALIDATION", "NUL")
}

func TestEnvironmentIsClean(t *testing.T) {
	t.Setenv("SPECQL_TEST_LEAK", "leak")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "leak")
	s := newShell(t, Options{})
	out := s.ok(call{
		Config:    Config{Environment: map[string]runner.Scalar{"LOG_LEVEL": "INFO", "EMPTY": ""}},
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/env"}},
		Operation: Operation{Command: []string{"env"}},
		Input:     map[string]any{"a": "b"},
	})
	got := map[string]string{}
	for line := range strings.SplitSeq(strings.TrimSpace(out["stdout"].(string)), "\n") {
		name, value, _ := strings.Cut(line, "=")
		got[name] = value
	}
	require.Equal(t, got["HOME"], got["TMPDIR"])
	require.NotEmpty(t, got["HOME"])
	require.NoDirExists(t, got["HOME"])
	require.NotEmpty(t, got["SPECQL_JOB_ID"])
	for _, name := range []string{"HOME", "TMPDIR", "SPECQL_JOB_ID", "TRACEPARENT"} {
		delete(got, name)
	}
	require.Equal(t, map[string]string{
		"PATH": "/usr/bin:/bin", "LOG_LEVEL": "INFO", "EMPTY": "", "SPECQL_INPUT": `{"a":"b"}`, "SPECQL_RUN_ID": "run-1", "SPECQL_IDEMPOTENCY_KEY": "key-1",
	}, got)
}

func TestHostileEnvironmentIsRefused(t *testing.T) {
	s := newShell(t, Options{})
	for _, name := range []string{"LD_PRELOAD", "LD_LIBRARY_PATH", "BASH_ENV", "ENV", "PERL5OPT", "GCONV_PATH", "SPECQL_JOB_ID", "A=B", "", "1A", "BASH_FUNC_x%%", "A\x00B"} {
		c := sh("true")
		c.Config.Environment = map[string]runner.Scalar{name: "/tmp/x.so"}
		s.fails(c, "VALIDATION", "runner_config.environment.")
	}
	c := sh("true")
	c.Config.Environment = map[string]runner.Scalar{"A": "x\x00y"}
	s.fails(c, "VALIDATION", "NUL")
}

func TestInputOnStdin(t *testing.T) {
	s := newShell(t, Options{})
	big := strings.Repeat("x", 1<<20)
	c := call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/python3"}},
		Operation: Operation{Command: []string{"/usr/bin/python3", "-c", `import sys,json,os;print(json.dumps({"n":len(json.load(sys.stdin)["big"]),"large":os.environ.get("SPECQL_INPUT_TOO_LARGE"),"env":os.environ.get("SPECQL_INPUT")}))`}},
		Input:     map[string]any{"big": big},
	}
	require.Equal(t, map[string]any{"n": float64(1 << 20), "large": "1", "env": nil}, s.ok(c))
	// A command that reads none of it.
	c = sh("exec <&-; echo '{\"ok\":true}'")
	c.Input = map[string]any{"big": big}
	require.Equal(t, map[string]any{"ok": true}, s.ok(c))
}

func TestInputThatIsNoObject(t *testing.T) {
	s := newShell(t, Options{})
	for _, in := range []string{`[1]`, `"x"`, `3`, `{`} {
		c := sh("true")
		c.Input = json.RawMessage(in)
		o := runnertest.Execute(t, s.client, s.job(c))
		if o.Err == nil {
			require.Equal(t, "VALIDATION", o.Code(), in)
		}
	}
}

func TestOutputForms(t *testing.T) {
	s := newShell(t, Options{})
	for line, want := range map[string]string{
		`printf '{"a":\n 1}'`:            `{"a":1}`,
		`printf '\n\n {"a":1} \n\n'`:     `{"a":1}`,
		`echo working; echo '{"b":2}'`:   `{"b":2}`,
		`echo '{"b":1}'; echo '{"b":2}'`: `{"b":2}`,
		`echo '{"b":2}'; echo done`:      `{"stdout":"{\"b\":2}\ndone\n","stderr":"","exit_code":0}`,
		`echo '[1]'; echo note >&2`:      `{"stdout":"[1]\n","stderr":"note\n","exit_code":0}`,
		`echo '{"a":NaN}'`:               `{"stdout":"{\"a\":NaN}\n","stderr":"","exit_code":0}`,
		`true`:                           `{"stdout":"","stderr":"","exit_code":0}`,
		`printf '\377\376ok\000<&>'`:     `{"stdout":"\ufffdok\ufffd<&>","stderr":"","exit_code":0}`,
		`printf '{"a":"\377"}'`:          `{"a":"\ufffd"}`,
		`printf 'a\r\n{"a":1}\r\n'`:      `{"a":1}`,
	} {
		o := s.run(sh(line))
		require.Nil(t, o.Finished.GetError(), line)
		require.JSONEq(t, want, string(o.Finished.GetOutput()), line)
	}
}

func TestLogLines(t *testing.T) {
	s := newShell(t, Options{})
	o := s.run(sh(`echo one; echo two >&2; printf 'a\r\n'; printf '\377\n'; head -c 100000 /dev/zero | tr '\0' x; echo; printf end`))
	lines := o.Lines("stdout")
	require.Len(t, lines, 5)
	require.Equal(t, []string{"one", "a", "\uFFFD"}, lines[:3])
	require.LessOrEqual(t, len(lines[3]), runner.MaxLogLine)
	require.Equal(t, "end", lines[4])
	require.Equal(t, []string{"two"}, o.Lines("stderr"))
}

func TestFloods(t *testing.T) {
	s := newShell(t, Options{})
	s.fails(sh("exec yes"), "RESOURCE_EXCEEDED", "4 MiB")
	s.fails(sh("exec cat /dev/zero"), "RESOURCE_EXCEEDED", "4 MiB")
	o := s.fails(sh("head -c 20000000 /dev/zero | tr '\\0' e >&2; echo the end >&2; exit 3"), "REMOTE_ERROR", "status 3", "the end")
	require.Less(t, len(o.Finished.GetError().GetMessage()), 4<<10)
}

func TestFailures(t *testing.T) {
	s := newShell(t, Options{})
	o := s.fails(sh("echo first >&2; echo broken >&2; exit 7"), "REMOTE_ERROR", "status 7", "first\nbroken")
	require.EqualValues(t, 7, o.Finished.GetUsage().GetExitCode())
	o = s.fails(sh("kill -SEGV $$"), "REMOTE_ERROR", "signal 11")
	require.EqualValues(t, 139, o.Finished.GetUsage().GetExitCode())
	o = s.fails(sh("kill -KILL $$"), "REMOTE_ERROR", "signal 9")
	require.EqualValues(t, 137, o.Finished.GetUsage().GetExitCode())
	require.False(t, o.Finished.GetUsage().GetOomKilled(), "a kill is no memory fault unless the kernel counted one")
}

func TestCommandsThatMayNotRun(t *testing.T) {
	s := newShell(t, Options{})
	dir := t.TempDir()
	cat := filepath.Join(dir, "cat")
	require.NoError(t, os.Symlink("/usr/bin/id", cat))
	run := func(argv0 string, allowed ...string) call {
		return call{Policy: Policy{AllowedCommands: allowed}, Operation: Operation{Command: []string{argv0}}}
	}
	o := s.fails(run("/usr/bin/id"), "POLICY_VIOLATION", "nothing may run", `add "/usr/bin/id"`)
	checks := o.Finished.GetSecurity().GetChecks()
	require.Len(t, checks, 1)
	require.False(t, checks[0].GetAllowed())
	require.Equal(t, "allowed_commands", checks[0].GetRule())
	require.Equal(t, "/usr/bin/id", checks[0].GetSubject())

	s.fails(run("/usr/bin/id", "/usr/bin/cat"), "POLICY_VIOLATION", `"/usr/bin/id"`)
	s.fails(run(cat, "/usr/bin/cat"), "POLICY_VIOLATION", "/usr/bin/id")          // the link's target counts
	s.fails(run("/usr/bin/../bin/id", "/usr/bin/cat"), "POLICY_VIOLATION")        // dots
	s.fails(run("/usr/bin/cat ", "/usr/bin/cat"), "POLICY_VIOLATION")             // not the same file
	s.fails(run("id", "/usr/bin/cat"), "POLICY_VIOLATION", "absolute path")       // a bare name looks nowhere else
	s.fails(run("./id", "/usr/bin/id"), "VALIDATION", "relative")                 //
	s.fails(run("bin/id", "bin/id"), "VALIDATION", "relative")                    //
	s.fails(run("", "/usr/bin/id"), "VALIDATION", "empty")                        //
	s.fails(run("/proc/self/exe", "/usr/bin/id"), "POLICY_VIOLATION")             // the runner itself
	s.fails(run("/usr/bin/nope", "/usr/bin/id"), "POLICY_VIOLATION")              // existence is not told
	s.fails(run("/usr/bin/nope", "/usr/bin/nope"), "VALIDATION", "not exist")     //
	s.fails(run("/usr/bin", "/usr/bin"), "VALIDATION", "not an executable")       // a directory
	s.fails(run("/etc/passwd", "/etc/passwd"), "VALIDATION", "not an executable") //
	s.fails(run("/usr/bin/python", "/usr/bin/python"), "VALIDATION", `add "/usr/bin/python3"`)

	// Links on either side that lead to the same file are fine.
	out := s.ok(run("/usr/bin/id", cat))
	require.Contains(t, out["stdout"], "uid=")
	s.ok(run(cat, "/bin/id"))
	s.ok(run("id", "/bin/id"))
}

func TestAProgramWithManyNamesIsTheListedOne(t *testing.T) {
	s := newShell(t, Options{})
	dir := t.TempDir()
	// Like busybox, it does what its name says.
	tool := file(t, dir, "tool", "#!/bin/sh\necho \"$0\"\n")
	for _, name := range []string{"cat", "rm"} {
		require.NoError(t, os.Symlink(tool, filepath.Join(dir, name)))
	}
	c := call{
		Policy:    Policy{AllowedCommands: []string{filepath.Join(dir, "cat"), "/usr/bin/env"}},
		Operation: Operation{Command: []string{filepath.Join(dir, "rm")}},
	}
	p, err := (&resolver{policy: c.Policy, checks: &runner.Checks{}, scripts: interpreters()}).fromCommand(c.Operation.Command, map[string]any{})
	require.NoError(t, err)
	require.Equal(t, filepath.Join(dir, "cat"), p.argv[0])
	s.ok(c)
}

func TestScripts(t *testing.T) {
	s := newShell(t, Options{})
	dir := t.TempDir()
	file(t, dir, "py.py", "import sys, json\nprint(json.dumps({'got': json.load(sys.stdin)['x']}))\n")
	file(t, dir, "js.js", "const x = JSON.parse(require('fs').readFileSync(0)).x; console.log(JSON.stringify({got: x}))\n")
	file(t, dir, "mjs.mjs", "import fs from 'fs'; console.log(JSON.stringify({got: JSON.parse(fs.readFileSync(0)).x}))\n")
	file(t, dir, "sh.sh", "read -r line; echo \"{\\\"got\\\":$(echo \"$line\" | tr -dc 0-9)}\"\n")
	file(t, dir, "pl.pl", "local $/; my $l = <STDIN>; $l =~ /(\\d+)/; print \"{\\\"got\\\":$1}\\n\";\n")
	own := file(t, dir, "own", "#!/bin/sh\necho '{\"got\":7}'\n")
	file(t, dir, "sub/deep.sh", "echo '{\"got\":7}'\n")
	policy := Policy{AllowedCommands: []string{"/usr/bin/python3", "/usr/bin/node", "/usr/bin/bash", "/usr/bin/perl", "/usr/bin/tr", own}}
	for _, name := range []string{"py", "js", "mjs", "sh", "pl", "own"} {
		c := call{Config: Config{WorkingDirectory: dir}, Policy: policy, Name: name, Input: map[string]any{"x": 7}}
		require.Equal(t, map[string]any{"got": float64(7)}, s.ok(c), name)
	}
	for _, script := range []string{"sub/deep.sh", "py.py", "./sub/../sub/deep.sh", "own"} {
		c := call{Config: Config{WorkingDirectory: dir}, Policy: policy, Operation: Operation{Script: script}, Input: map[string]any{"x": 7}}
		require.Equal(t, map[string]any{"got": float64(7)}, s.ok(c), script)
	}
	// bash is preferred for .sh, and sh does it, too.
	c := call{Config: Config{WorkingDirectory: dir}, Policy: Policy{AllowedCommands: []string{"/bin/sh"}}, Operation: Operation{Script: "sub/deep.sh"}}
	s.ok(c)
}

func TestScriptsThatMayNotRun(t *testing.T) {
	s := newShell(t, Options{})
	top := t.TempDir()
	dir := filepath.Join(top, "work")
	outside := file(t, top, "outside.sh", "echo '{}'\n")
	file(t, dir, "in.sh", "echo '{}'\n")
	file(t, dir, "data.txt", "x")
	own := file(t, dir, "own", "#!/bin/sh\n")
	file(t, dir, "twice.sh", "")
	file(t, dir, "twice.py", "")
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "link.sh")))
	require.NoError(t, os.Symlink(top, filepath.Join(dir, "up")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "dir.sh"), 0o700))
	script := func(name string, allowed ...string) call {
		return call{Config: Config{WorkingDirectory: dir}, Policy: Policy{AllowedCommands: allowed}, Operation: Operation{Script: name}}
	}
	named := func(name string, allowed ...string) call {
		return call{Config: Config{WorkingDirectory: dir}, Policy: Policy{AllowedCommands: allowed}, Name: name}
	}
	for _, name := range []string{"../outside.sh", "link.sh", "up/outside.sh", "in.sh/../../outside.sh"} {
		o := s.run(script(name, "/bin/sh"))
		require.Contains(t, []string{"POLICY_VIOLATION", "VALIDATION"}, o.Code(), name)
		require.NotContains(t, string(o.Finished.GetOutput()), "{")
	}
	s.fails(script("link.sh", "/bin/sh"), "POLICY_VIOLATION", "leads out of working_directory")
	s.fails(script(outside, "/bin/sh"), "VALIDATION", "below working_directory")
	s.fails(script("nope.sh", "/bin/sh"), "VALIDATION", "does not exist")
	s.fails(script("dir.sh", "/bin/sh"), "VALIDATION", "not a file")
	s.fails(script("data.txt", "/bin/sh"), "VALIDATION", "no interpreter is known")
	s.fails(script("in.sh", "/usr/bin/python3"), "POLICY_VIOLATION", `add "/usr/bin/bash"`)
	s.fails(script("in.sh"), "POLICY_VIOLATION", "nothing may run")
	s.fails(script("twice.py", "/usr/bin/python"), "VALIDATION", "/usr/bin/python", `add "/usr/bin/python3"`)
	s.fails(script("own", "/bin/sh"), "POLICY_VIOLATION", own)
	s.fails(named("twice", "/bin/sh"), "VALIDATION", "several files")
	s.fails(named("nothing", "/bin/sh"), "VALIDATION", "no file named after")
	for _, name := range []string{"../outside", ".", "..", "up/outside", ".hidden", "x\x00"} {
		o := runnertest.Execute(t, s.client, s.job(named(name, "/bin/sh")))
		require.True(t, o.Err != nil || o.Code() == "VALIDATION", name)
	}
	c := script("in.sh", "/bin/sh")
	c.Operation.Command = []string{"/bin/sh"}
	s.fails(c, "VALIDATION", "both command and script")
	s.fails(call{Policy: Policy{AllowedCommands: []string{"/bin/sh"}}}, "VALIDATION", "neither command nor script")
	// The working directory is where the caller says, with what the kernel cannot execute in it.
	bad := file(t, dir, "bad", "no interpreter line")
	s.fails(call{Policy: Policy{AllowedCommands: []string{bad}}, Operation: Operation{Command: []string{bad}}}, "VALIDATION", "#!")
	gone := file(t, dir, "gone", "#!/usr/bin/no-such-interpreter\n")
	s.fails(call{Policy: Policy{AllowedCommands: []string{gone}}, Operation: Operation{Command: []string{gone}}}, "VALIDATION", "interpreter")
}

func TestWorkingDirectory(t *testing.T) {
	s := newShell(t, Options{})
	top := t.TempDir()
	dir := filepath.Join(top, "work")
	require.NoError(t, os.Mkdir(dir, 0o700))
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(dir, link))
	pwd := func(dir string, tops ...string) call {
		return call{
			Config:    Config{WorkingDirectory: dir},
			Policy:    Policy{AllowedCommands: []string{"/bin/pwd"}, WorkingDirectoryRestrictions: tops},
			Operation: Operation{Command: []string{"/bin/pwd"}},
		}
	}
	for _, c := range []call{pwd(dir), pwd(link), pwd(dir, top), pwd(link, "/nope", top), pwd(dir, dir), pwd(dir, filepath.Dir(link), link)} {
		require.Equal(t, dir+"\n", s.ok(c)["stdout"])
	}
	require.Contains(t, s.ok(pwd(""))["stdout"], "job-", "without one it is the private directory")
	s.fails(pwd(link, filepath.Dir(link)+"/other"), "POLICY_VIOLATION", dir)
	s.fails(pwd(link, filepath.Dir(link)), "POLICY_VIOLATION", dir) // the link lies there, the directory does not
	s.fails(pwd(dir, dir+"x", "relative"), "POLICY_VIOLATION")
	s.fails(pwd("relative"), "VALIDATION", "absolute path")
	s.fails(pwd(top+"/nope"), "VALIDATION", "does not exist")
	s.fails(pwd("/bin/sh"), "VALIDATION", "not a directory")
}

func TestCeiling(t *testing.T) {
	top := t.TempDir()
	s := newShell(t, Options{Ceiling: &Policy{
		AllowedCommands: []string{"/bin/sh", "/usr/bin/cat"}, WorkingDirectoryRestrictions: []string{top},
		ResourceLimits: Limits{Processes: 2, MemoryMB: 64}, NetworkAccess: "none",
	}})
	s.fails(call{Policy: Policy{AllowedCommands: []string{"/usr/bin/id"}}, Operation: Operation{Command: []string{"/usr/bin/id"}}}, "POLICY_VIOLATION", "ceiling.allowed_commands")
	c := sh("true")
	c.Config.WorkingDirectory = "/usr"
	s.fails(c, "POLICY_VIOLATION", "ceiling.working_directory_restrictions")
	c.Config.WorkingDirectory = top
	s.ok(c)
	c = sh("sleep 0.01 | sleep 0.01 | sleep 0.01 || exit 1; exit 1").with(Limits{Processes: 1000})
	c.Policy.NetworkAccess = "all"
	o := s.fails(c, "RESOURCE_EXCEEDED", "limit of 2")
	require.Contains(t, o.Finished.GetSecurity().GetIsolation(), "network_namespace")
}

func TestHostileLimits(t *testing.T) {
	s := newShell(t, Options{})
	for _, limits := range []string{`{"memory_mb":-1}`, `{"processes":-5}`, `{"cpu_cores":-0.1}`, `{"memory_mb":9223372036854775807}`, `{"memory_mb":1e99}`, `{"no_such":1}`, `{"timeout_seconds":1e300}`} {
		j := s.job(sh("true"))
		j.Service.SecurityPolicy = []byte(`{"allowed_commands":["/bin/sh"],"resource_limits":` + limits + `}`)
		o := runnertest.Execute(t, s.client, j)
		require.NoError(t, o.Err)
		require.Equal(t, "VALIDATION", o.Code(), limits)
	}
	_, err := New(Options{Ceiling: &Policy{ResourceLimits: Limits{MemoryMB: -1}}})
	require.ErrorContains(t, err, "memory_mb")
}

func TestMemoryLimit(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	hog := `x=0123456789abcdef; while :; do x=$x$x; done`
	o := s.fails(sh(hog).with(Limits{MemoryMB: 32}), "RESOURCE_EXCEEDED", "limit of 32 MiB", "peak 32.0 MiB")
	require.True(t, o.Finished.GetUsage().GetOomKilled())
	require.InDelta(t, 32, o.Finished.GetUsage().GetPeakMemoryMb(), 1)
	require.EqualValues(t, 137, o.Finished.GetUsage().GetExitCode())
	// A job that goes on after a child was ended is not whole.
	o = s.fails(sh(`(`+hog+`); echo '{"ok":true}'`).with(Limits{MemoryMB: 32}), "RESOURCE_EXCEEDED")
	require.True(t, o.Finished.GetUsage().GetOomKilled())
	o = s.fails(sh(`(`+hog+`); sleep 1000`).with(Limits{MemoryMB: 32}), "RESOURCE_EXCEEDED")
	require.Less(t, o.Finished.GetUsage().GetDurationSeconds(), 20.0)
	// Enough is enough.
	require.False(t, s.run(sh("true").with(Limits{MemoryMB: 32})).Finished.GetUsage().GetOomKilled())
}

func requireGroups(t *testing.T, s *shell) {
	t.Helper()
	if s.r.groups == cgroup.None {
		t.Fatalf("run as root, or with control groups delegated: %s", s.r.noGroup)
	}
}

func TestForkBomb(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	begin := time.Now()
	o := runnertest.Begin(t, s.client, s.job(call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/python3"}},
		Operation: Operation{Command: []string{"/usr/bin/python3", "-c", "import os\nwhile True:\n try: os.fork()\n except OSError: pass"}},
	}.with(Limits{Processes: 64, CPUCores: 0.5})))
	o.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetUsage() != nil })
	o.Cancel("enough")
	require.Equal(t, "CANCELLED", o.Wait().Code())
	require.Less(t, time.Since(begin), 20*time.Second)
	s.fails(sh(`set -e; sleep 0.1 | sleep 0.1 | sleep 0.1 | sleep 0.1; exit 2`).with(Limits{Processes: 2}), "RESOURCE_EXCEEDED", "limit of 2")
}

func TestCPULimit(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	o := s.fails(sh(`while :; do :; done`).with(Limits{CPUSeconds: 0.3}), "RESOURCE_EXCEEDED", "cpu_seconds")
	require.InDelta(t, 0.3, o.Finished.GetUsage().GetCpuSeconds(), 0.3)
	// It is of the whole tree: none of these uses as much alone.
	s.fails(sh(`for i in 1 2 3 4 5 6 7 8; do (i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done) & done; wait; sleep 1000`).with(Limits{CPUSeconds: 0.5}), "RESOURCE_EXCEEDED", "cpu_seconds")
}

func TestCPUCores(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	o := s.fails(sh(`while :; do :; done`).with(Limits{CPUCores: 0.2, TimeoutSeconds: 1}), "TIMEOUT")
	require.Less(t, o.Finished.GetUsage().GetCpuUsagePercent(), 35.0)
}

func TestDiskLimit(t *testing.T) {
	s := newShell(t, Options{})
	s.fails(sh(`exec head -c 3000000 /dev/zero >"$TMPDIR/x"`).with(Limits{DiskMB: 2}), "RESOURCE_EXCEEDED", "disk_mb")
	s.fails(sh(`for i in 1 2 3; do head -c 1000000 /dev/urandom >"$TMPDIR/$i"; done`).with(Limits{DiskMB: 2}), "RESOURCE_EXCEEDED", "disk_mb")
	s.fails(sh(`for i in 1 2 3; do head -c 1000000 /dev/urandom >"$TMPDIR/$i"; done; sleep 1000`).with(Limits{DiskMB: 2}), "RESOURCE_EXCEEDED", "disk_mb")
	s.ok(sh(`head -c 1000000 /dev/zero >"$TMPDIR/x"`).with(Limits{DiskMB: 2}))
	// The signal of a child is not told: what it wrote is.
	s.fails(sh(`head -c 3000000 /dev/zero >"$TMPDIR/x"; echo '{"ok":true}'`).with(Limits{DiskMB: 2}), "RESOURCE_EXCEEDED", "disk_mb")
	dir := t.TempDir()
	c := sh(`head -c 3000000 /dev/zero >sub/x; echo '{"ok":true}'`).with(Limits{DiskMB: 2})
	c.Config.WorkingDirectory = dir
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	s.fails(c, "RESOURCE_EXCEEDED", "disk_mb")
	// A file that was there before is nobody's fault, nor is one of the limit's size.
	require.NoError(t, os.Chtimes(filepath.Join(dir, "sub", "x"), time.Time{}, time.Now().Add(-time.Hour)))
	c = sh(`head -c 2097152 /dev/zero >y; echo '{"ok":true}'`).with(Limits{DiskMB: 2})
	c.Config.WorkingDirectory = dir
	s.ok(c)
}

func TestTimeoutOfThePolicy(t *testing.T) {
	s := newShell(t, Options{})
	o := s.fails(sh(`sleep 1000`).with(Limits{TimeoutSeconds: 0.2}), "TIMEOUT", "timeout_seconds")
	require.True(t, o.Finished.GetError().GetRetryable())
	require.EqualValues(t, 137, o.Finished.GetUsage().GetExitCode())
}

func TestDaemonsGoWithTheJob(t *testing.T) {
	withAndWithout(t, func(t *testing.T, s *shell) {
		path := fifo(t)
		gate := path + ".gate"
		require.NoError(t, syscall.Mkfifo(gate, 0o600))
		begin := time.Now()
		c := runnertest.Begin(t, s.client, s.job(sh(daemonize(path)+`; echo '{"ok":true}'; read -r x <`+gate+`; echo`).in(filepath.Dir(path))))
		pid := pidFrom(t, path) // it is up, and holds the job's stdout
		require.NoError(t, os.WriteFile(gate, []byte("go\n"), 0o600))
		o := c.Wait()
		require.NoError(t, o.Err)
		require.Empty(t, o.Code(), "%v", o.Finished.GetError())
		requireGone(t, pid)
		require.Less(t, time.Since(begin), 10*time.Second)
	})
}

func TestCancelEndsDaemons(t *testing.T) {
	withAndWithout(t, func(t *testing.T, s *shell) {
		path := fifo(t)
		c := runnertest.Begin(t, s.client, s.job(sh(`trap '' TERM INT HUP; `+daemonize(path)+`; sleep 1000 & wait; sleep 1000`).in(filepath.Dir(path))))
		pid := pidFrom(t, path)
		c.Cancel("enough")
		o := c.Wait()
		require.Equal(t, "CANCELLED", o.Code())
		requireGone(t, pid)
	})
}

func TestNetworkAccess(t *testing.T) {
	s := newShell(t, Options{})
	count := call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/wc"}},
		Operation: Operation{Command: []string{"/usr/bin/wc", "-l", "/proc/self/net/dev"}},
	}
	o := s.run(count)
	if s.r.noNet != nil {
		require.NotContains(t, o.Finished.GetSecurity().GetIsolation(), "network_namespace")
		require.NotEmpty(t, o.Lines("runner"))
		t.Fatalf("run as root: %v", s.r.noNet)
	}
	require.Contains(t, o.Finished.GetSecurity().GetIsolation(), "network_namespace")
	out, _ := output(t, o)["stdout"].(string)
	require.True(t, strings.HasPrefix(out, "3 "), "two lines of heading and lo: %s", out)
	own, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	o = s.run(call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/readlink"}, NetworkAccess: "all"},
		Operation: Operation{Command: []string{"/usr/bin/readlink", "/proc/self/ns/net"}},
	})
	require.NotContains(t, o.Finished.GetSecurity().GetIsolation(), "network_namespace")
	require.Equal(t, own+"\n", output(t, o)["stdout"])
	// The runner's own thread is not moved.
	now, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	require.Equal(t, own, now)
}

func TestLocalhostIsTheJobsOwn(t *testing.T) {
	s := newShell(t, Options{})
	if s.r.noLoop != nil {
		t.Fatalf("run as root: %v", s.r.noLoop)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, listener.Close()) }()
	c := call{
		Policy: Policy{AllowedCommands: []string{"/usr/bin/python3"}, NetworkAccess: "localhost"},
		Operation: Operation{Command: []string{"/usr/bin/python3", "-c", `
import json, socket, sys
def reach(host, port):
    try:
        socket.create_connection((host, port), 2).close()
        return "reached"
    except OSError as e:
        return e.strerror
own = socket.create_server(("127.0.0.1", 0))
print(json.dumps({"own": reach("127.0.0.1", own.getsockname()[1]), "host": reach("127.0.0.1", int(sys.argv[1])), "far": reach("192.0.2.1", 80), "names": [n for _, n in socket.if_nameindex() if n == "lo" or n.startswith("e")]}))
`, "$input.port"}},
		Input: map[string]any{"port": listener.Addr().(*net.TCPAddr).Port},
	}
	o := s.run(c)
	require.Empty(t, o.Code(), "%v", o.Finished.GetError())
	require.Equal(t, map[string]any{"own": "reached", "host": "Connection refused", "far": "Network is unreachable", "names": []any{"lo"}}, output(t, o))
	require.Contains(t, o.Finished.GetSecurity().GetIsolation(), "network_namespace")

	s.r.noLoop = errors.New("the test says so")
	o = s.fails(c, "POLICY_VIOLATION", "network_access forbids localhost", "the test says so")
	require.Nil(t, o.Finished.GetUsage().ExitCode, "nothing ran")
	checks := o.Finished.GetSecurity().GetChecks()
	require.Equal(t, "network_access", checks[len(checks)-1].GetRule())
	require.False(t, checks[len(checks)-1].GetAllowed())
}

func TestHowACommandIsHeld(t *testing.T) {
	s := newShell(t, Options{})
	out := s.ok(call{Policy: Policy{AllowedCommands: []string{"/usr/bin/cat"}}, Operation: Operation{Command: []string{"/usr/bin/cat", "/proc/self/status", "/proc/self/limits"}}})
	require.Regexp(t, `NoNewPrivs:\s+1`, out["stdout"])
	require.Regexp(t, `TracerPid:\s+0`, out["stdout"])
	for _, set := range []string{"Inh", "Prm", "Eff", "Bnd", "Amb"} {
		if set != "Bnd" || os.Getuid() == 0 {
			require.Regexp(t, `Cap`+set+`:\s+0+\n`, out["stdout"])
		}
	}
	require.Regexp(t, `Max core file size\s+0\s+0`, out["stdout"])
	out = s.ok(call{Policy: Policy{AllowedCommands: []string{"/usr/bin/ls"}}, Operation: Operation{Command: []string{"/usr/bin/ls", "/proc/self/fd"}}})
	require.Equal(t, "0\n1\n2\n3\n", out["stdout"], "no descriptor is inherited (3 is the directory)")
	// The runner's own process is not changed by it.
	status, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	require.Regexp(t, `NoNewPrivs:\s+0`, string(status))
	if os.Getuid() == 0 {
		require.NotRegexp(t, `CapEff:\s+0+\n`, string(status))
	}
}

func TestHardToRemoveFiles(t *testing.T) {
	s := newShell(t, Options{})
	s.ok(sh(`cd "$TMPDIR"; mkdir -p a/b/c; echo x >a/b/c/f; chmod 0 a/b/c a; ln -s /etc/passwd link; mkfifo fifo; umask 777; mkdir -m 0 z`))
	require.FileExists(t, "/etc/passwd")
}

func TestArgumentsTooLong(t *testing.T) {
	s := newShell(t, Options{})
	echo := func(args ...string) call {
		return call{
			Policy:    Policy{AllowedCommands: []string{"/bin/echo"}},
			Operation: Operation{Command: append([]string{"/bin/echo"}, args...)}, Input: map[string]any{"x": strings.Repeat("x", 130<<10)},
		}
	}
	s.fails(echo("$input.x"), "VALIDATION", "command[1] is 130 KiB", "stdin")
	c := echo("$input.x")
	c.Input = map[string]any{"x": strings.Repeat("x", 127<<10)}
	s.ok(c)
	var many []string
	for range 20 {
		many = append(many, "$input.x")
	}
	c.Operation = echo(many...).Operation
	s.fails(c, "VALIDATION", "together")
}

func TestMeasuredUsage(t *testing.T) {
	s := newShell(t, Options{})
	requireGroups(t, s)
	job := s.job(call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/python3"}},
		Operation: Operation{Command: []string{"/usr/bin/python3", "-c", "import time\nx = bytearray(50 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nt = time.process_time()\nwhile time.process_time() - t < 0.2: pass\ntime.sleep(1.3)\nprint('{}')"}},
	})
	c := runnertest.Begin(t, s.client, job)
	live := c.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetUsage() != nil }).GetUsage()
	require.Greater(t, live.GetMemoryMb(), 45.0)
	o := c.Wait()
	require.Empty(t, o.Code(), "%v", o.Finished.GetError())
	u := o.Finished.GetUsage()
	require.Equal(t, "cgroup", u.GetSource())
	require.Greater(t, u.GetCpuSeconds(), 0.2)
	require.Less(t, u.GetCpuSeconds(), u.GetDurationSeconds())
	require.InDelta(t, u.GetCpuSeconds()/u.GetDurationSeconds()*100, u.GetCpuUsagePercent(), 10)
	require.Greater(t, u.GetMemoryMb(), 45.0)
	require.Greater(t, u.GetPeakMemoryMb(), 50.0)
	require.Less(t, u.GetPeakMemoryMb(), 90.0)
	require.EqualValues(t, 0, u.GetExitCode())
	require.NotNil(t, u.OomKilled)
	require.Nil(t, u.NetworkRxMb)
	require.Nil(t, u.StatusCode)

	o = s.run(sh("true"))
	require.Less(t, o.Finished.GetUsage().GetPeakMemoryMb(), 8.0, "the runner's own memory is not the job's")
	o = s.fails(call{Policy: Policy{}, Operation: Operation{Command: []string{"/bin/true"}}}, "POLICY_VIOLATION")
	require.Nil(t, o.Finished.GetUsage().ExitCode)
	require.Nil(t, o.Finished.GetUsage().CpuSeconds)
}

func TestWithoutControlGroups(t *testing.T) {
	s := newShellWithout(t, Options{without: spaces(true)})
	o := s.run(sh("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").with(Limits{CPUCores: 1, MemoryMB: 100, Processes: 100}))
	u := o.Finished.GetUsage()
	require.Equal(t, "rusage", u.GetSource())
	require.Positive(t, u.GetCpuSeconds())
	require.Nil(t, u.MemoryMb)
	require.Nil(t, u.OomKilled)
	require.NotContains(t, o.Finished.GetSecurity().GetIsolation(), "cgroup")
	require.Contains(t, strings.Join(o.Lines("runner"), "\n"), "cpu_cores is not enforced")
	if os.Getuid() == 0 {
		require.Contains(t, strings.Join(o.Lines("runner"), "\n"), "resource_limits.processes is not enforced")
	}
	s.fails(sh(`while :; do :; done`).with(Limits{CPUSeconds: 0.5}), "RESOURCE_EXCEEDED", "cpu_seconds")
	s.fails(call{
		Policy:    Policy{AllowedCommands: []string{"/usr/bin/python3"}},
		Operation: Operation{Command: []string{"/usr/bin/python3", "-c", "x = bytearray(500 << 20)"}},
	}.with(Limits{MemoryMB: 64}), "REMOTE_ERROR", "MemoryError")
	d, err := s.r.Describe(t.Context())
	require.NoError(t, err)
	for _, f := range d.Isolation {
		if f.Name == "cgroup" {
			require.False(t, f.Available)
			require.Equal(t, "it is not wanted", f.Detail)
		}
		if f.Name == "rlimit" && os.Getuid() == 0 {
			require.Contains(t, f.Detail, "resource_limits.processes is not enforced")
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	s := newShell(t, Options{})
	client := runnertest.Start(t, s.r, runner.Options{MaxConcurrency: 64, DrainTimeout: time.Second})
	var wait sync.WaitGroup
	outcomes := make([]*runnertest.Outcome, 50)
	for i := range outcomes {
		c := sh(`cat`)
		c.Input = map[string]any{"i": i}
		call := runnertest.Begin(t, client, s.job(c))
		wait.Go(func() { outcomes[i] = call.Wait() })
	}
	wait.Wait()
	for i, o := range outcomes {
		require.NoError(t, o.Err)
		require.Empty(t, o.Code(), "%v", o.Finished.GetError())
		require.Equal(t, map[string]any{"i": float64(i)}, output(t, o))
	}
}

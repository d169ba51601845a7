package shellrunner

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// everyWay runs a test with name spaces and without.
func everyWay(t *testing.T, test func(t *testing.T, s *shell)) {
	t.Helper()
	t.Run("name spaces", func(t *testing.T) { test(t, newShell(t, Options{})) })
	t.Run("no name spaces", func(t *testing.T) { test(t, newShell(t, Options{without: spaces(true)})) })
}

func TestFileAccess(t *testing.T) {
	everyWay(t, func(t *testing.T, s *shell) {
		dir := t.TempDir()
		file(t, dir, "data", "42\n")
		file(t, dir, "do.sh", `
cat data 2>/dev/null || echo hidden
{ echo x >new; } 2>/dev/null && echo wrote
{ echo x >>data; } 2>/dev/null && echo changed
{ echo x >"$TMPDIR/new"; } 2>/dev/null && echo temporary
true
`)
		for access, want := range map[string]string{
			fileReadWrite: "42\nwrote\nchanged\ntemporary\n", fileRead: "42\ntemporary\n", fileNone: "hidden\ntemporary\n", "": "42\nwrote\nchanged\ntemporary\n",
		} {
			file(t, dir, "data", "42\n")
			require.NoError(t, os.RemoveAll(filepath.Join(dir, "new")))
			c := call{Policy: Policy{AllowedCommands: tools, FileAccess: access}, Operation: Operation{Script: "do.sh"}}.in(dir)
			require.Equal(t, want, s.ok(c)["stdout"], access)
		}
	})
}

func TestFilesBelongToTheOwnerOfTheDirectory(t *testing.T) {
	require.Zero(t, os.Getuid(), "only root can give directories away: run the tests as root")
	s := newShell(t, Options{})
	for _, owner := range []int{0, 1234} {
		dir := t.TempDir()
		file(t, dir, "old", "x")
		for _, f := range []string{dir, filepath.Join(dir, "old")} {
			require.NoError(t, os.Chown(f, owner, owner))
		}
		require.NoError(t, os.Chmod(dir, 0o700))
		out := s.ok(sh(`echo y >>old && mkdir sub && echo new >sub/new && cat old`).in(dir))
		require.Equal(t, "xy\n", out["stdout"])
		for _, f := range []string{"old", "sub", "sub/new"} {
			info, err := os.Stat(filepath.Join(dir, f))
			require.NoError(t, err)
			require.EqualValues(t, owner, info.Sys().(*syscall.Stat_t).Uid, f)
			require.EqualValues(t, owner, info.Sys().(*syscall.Stat_t).Gid, f)
		}
	}
	// Nobody is root outside, whatever the job thinks of itself.
	c := s.job(call{Policy: Policy{AllowedCommands: tools}, Operation: Operation{Command: []string{"/bin/cat", "/proc/self/status"}}})
	o := runnertest.Execute(t, s.client, c)
	require.NoError(t, o.Err)
	require.Regexp(t, `Uid:\s+18791\d+\s`, output(t, o)["stdout"])
	require.Contains(t, o.Finished.GetSecurity().GetIsolation(), sandbox.OwnUID)
}

// An installation of its own is seen with its libraries, and with nothing else of the place.
func TestProgramOfAnInstallation(t *testing.T) {
	everyWay(t, func(t *testing.T, s *shell) {
		top := t.TempDir()
		tool := file(t, top, "app/bin/tool", "#!/bin/sh\nd=${0%/bin/*}\nread -r x <$d/lib/data && echo \"$x\"\n{ read -r x <$d/secret; } 2>/dev/null && echo \"$x\"\n{ read -r x <$d/bin/other; } 2>/dev/null && echo \"$x\"\ntrue\n")
		file(t, top, "app/lib/data", "library\n")
		file(t, top, "app/secret", "secret\n")
		file(t, top, "app/bin/other", "other\n")
		c := call{Policy: Policy{AllowedCommands: []string{tool}}, Operation: Operation{Command: []string{tool}}}
		require.Equal(t, "library\n", s.ok(c)["stdout"])
	})
}

func TestPythonEnvironment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "venv")
	text, err := exec.Command("/usr/bin/python3", "-m", "venv", "--without-pip", dir).CombinedOutput()
	require.NoError(t, err, "python3 makes no environments; apt-get install python3-minimal python3-venv: %s", text)
	packages, err := filepath.Glob(filepath.Join(dir, "lib", "python3*", "site-packages"))
	require.NoError(t, err)
	require.Len(t, packages, 1)
	file(t, packages[0], "ours.py", "answer = 42\n")
	python := filepath.Join(dir, "bin", "python3")
	everyWay(t, func(t *testing.T, s *shell) {
		c := call{
			Policy:    Policy{AllowedCommands: []string{python}},
			Operation: Operation{Command: []string{python, "-c", `import ours, sys, json; print(json.dumps({"answer": ours.answer, "prefix": sys.prefix}))`}},
		}
		require.Equal(t, map[string]any{"answer": 42.0, "prefix": dir}, s.ok(c))
	})
}

// What an allowed command executes is held to the list, with what the list implies.
func TestExecutionIsHeldToTheList(t *testing.T) {
	everyWay(t, func(t *testing.T, s *shell) {
		dir := t.TempDir()
		own := file(t, dir, "own", "#!/usr/bin/env perl\nprint qq({\"by\":\"perl\"}\\n);\n")
		c := call{Policy: Policy{AllowedCommands: []string{own}}, Operation: Operation{Command: []string{own}}}.in(dir)
		require.Equal(t, map[string]any{"by": "perl"}, s.ok(c), "its interpreter comes with a script")

		c = sh(`/usr/bin/id`)
		o := s.fails(c, "REMOTE_ERROR", "status 126", "must be in allowed_commands")
		require.Contains(t, o.Finished.GetError().GetMessage(), "ermission denied")
		c.Policy.AllowedCommands = append(slices.Clone(tools), "/usr/bin/id")
		require.Contains(t, s.ok(c)["stdout"], "uid=")

		// The operator's list goes over the registry's.
		s.r.ceiling = &Policy{AllowedCommands: []string{"/bin/sh", "/bin/cat"}}
		s.fails(c, "REMOTE_ERROR", "status 126")
		s.r.ceiling = nil

		// A program that may be executed can be read, others cannot.
		require.Equal(t, "read\nno\n", s.ok(sh(`head -c 4 /bin/cat >/dev/null && echo read; head -c 4 /usr/bin/id 2>/dev/null || echo no`))["stdout"])
	})
}

func TestWorkingDirectoriesThatNoJobGets(t *testing.T) {
	s := newShell(t, Options{})
	for _, dir := range []string{"/", "/proc", "/proc/self", "/dev", "/sys/kernel"} {
		s.fails(sh("true").in(dir), "VALIDATION", "cannot be given to a job")
	}
}

// The working directory may hold the place of all jobs: the others are hidden.
func TestJobsBelowTheWorkingDirectory(t *testing.T) {
	top := t.TempDir()
	s := newShell(t, Options{TempDir: top})
	other := file(t, s.r.temp, "job-other/secret", "x")
	defer func() { require.NoError(t, os.RemoveAll(filepath.Dir(other))) }()
	out := s.ok(sh(`echo mine >"$TMPDIR/x" && cat "$TMPDIR/x"; cat ` + other + ` 2>/dev/null; ls ` + s.r.temp).in(top))
	require.Regexp(t, `^mine\njob-\d+\n$`, out["stdout"])
}

func TestChecksAndDigestAreTold(t *testing.T) {
	s := newShell(t, Options{Ceiling: &Policy{NetworkAccess: networkNone, FileAccess: fileRead}})
	c := sh("true")
	c.Policy.NetworkAccess = networkAll
	security := s.run(c).Finished.GetSecurity()
	verdicts := map[string]string{}
	for _, check := range security.GetChecks() {
		require.True(t, check.GetAllowed())
		verdicts[check.GetRule()] = check.GetSubject()
	}
	require.Equal(t, networkNone, verdicts["network_access"], "what is in force, not what was asked for")
	require.Equal(t, fileRead, verdicts["file_access"])
	require.NotEmpty(t, verdicts["allowed_commands"])
	require.NotEqual(t, security.GetPolicyDigest(), newShell(t, Options{}).run(c).Finished.GetSecurity().GetPolicyDigest())
}

// A launcher that waits can be ended by a machine short of memory.
func TestLauncherThatWasEnded(t *testing.T) {
	s := newShell(t, Options{})
	s.ok(sh("true"))
	ended := 0
	all := processes()
	for pid := range all {
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if err == nil && descends(all, pid) && strings.HasPrefix(string(line), "specql-sandbox\x00spaces") {
			require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
			require.Eventually(t, func() bool { p, there := processes()[pid]; return !there || p.state == 'Z' }, time.Minute, time.Millisecond)
			ended++
		}
	}
	for range ended + 2 {
		s.ok(sh("true"))
	}
}

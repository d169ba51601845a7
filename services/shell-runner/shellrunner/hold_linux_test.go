package shellrunner

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// secretVariable is in the environment of a runner whose jobs are to find nothing of it.
const secretVariable = "SHELLRUNNER_TEST_SECRET"

// snoop reads what a job can see of its runner and prints how often the secret is in it.
const snoop = `cat /proc/$PPID/environ /proc/$PPID/task/*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c -e SHELLRUNNER_TEST_SECRET -e the-secret; for p in /proc/$PPID /proc/$PPID/task/*; do ls $p/root/ 2>/dev/null; readlink $p/fd/0 $p/exe; head -c 1 $p/mem 2>/dev/null; done; true`

// TestARunnerKeepsItsSecrets starts a runner of its own, since a process's environment is that
// which it was started with.
func TestARunnerKeepsItsSecrets(t *testing.T) {
	for name, uid := range map[string]uint32{"as this user": uint32(os.Getuid()), "as another": 65534} { //nolint:gosec // a user's number
		t.Run(name, func(t *testing.T) {
			if os.Getuid() != 0 && uid != uint32(os.Getuid()) { //nolint:gosec // a user's number
				t.Fatal("run as root: only root can become another user")
			}
			dir, err := os.MkdirTemp("/tmp", "snoop-") //nolint:usetesting // t.TempDir lies where another user does not get
			require.NoError(t, err)
			defer func() { require.NoError(t, os.RemoveAll(dir)) }()
			require.NoError(t, os.Chown(dir, int(uid), -1))
			cmd := exec.Command("/proc/self/exe")
			cmd.Dir = "/"
			cmd.Env = append(os.Environ(), snoopVariable+"="+dir, secretVariable+"=the-secret", "HOME=/")
			if uid != uint32(os.Getuid()) { //nolint:gosec // a user's number
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			}
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			require.JSONEq(t, `{"stdout":"0\n","stderr":"","exit_code":0}`, string(out))
		})
	}
}

// snoopingRunner runs the job that looks for the secret and prints its output.
func snoopingRunner(dir string) {
	out, err := func() (json.RawMessage, error) {
		r, err := New(Options{TempDir: dir})
		if err != nil {
			return nil, err
		}
		operation, err := json.Marshal(Operation{Command: []string{"/bin/sh", "-c", snoop}})
		if err != nil {
			return nil, err
		}
		policy, err := json.Marshal(Policy{AllowedCommands: tools, NetworkAccess: networkAll})
		if err != nil {
			return nil, err
		}
		result, err := r.Execute(context.Background(), &runner.Job{
			ID: "snoop", Service: runner.Service{Policy: policy},
			Operation: runner.Operation{Config: operation},
		}, discard{})
		if err == nil && result.Err != nil {
			err = result.Err
		}
		if err != nil {
			return nil, err
		}
		return result.Output, r.Close()
	}()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(string(out))
	os.Exit(0)
}

// escape is a shell line that does all to leave its job: it leaves each control group that it
// may, the session, and its environment, and its parent ends.
func escape(pidFile, gate string) string {
	return `for g in $(find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs); do echo $$ >$g; done 2>/dev/null
for g in $(find /sys/fs/cgroup -maxdepth 2 -name tasks); do echo $$ >$g; done 2>/dev/null
env -i /usr/bin/setsid /bin/sh -c '/bin/sh -c "echo \$\$ >` + pidFile + `; exec sleep 77777" & exit 0' </dev/null >/dev/null 2>&1 &
read -r x <` + gate + `; echo '{"ok":true}'`
}

func TestNothingOutlivesTheJobWhateverItDoes(t *testing.T) {
	withAndWithout(t, func(t *testing.T, s *shell) {
		path := fifo(t)
		gate := path + ".gate"
		require.NoError(t, syscall.Mkfifo(gate, 0o600))
		c := runnertest.Begin(t, s.client, s.job(sh(escape(path, gate)).in(filepath.Dir(path))))
		pid := pidFrom(t, path)
		t.Cleanup(func() {
			if _, there := processes()[pid]; there {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		})
		escaped := false
		if s.r.groups != 0 && os.Getuid() == 0 {
			groups, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
			require.NoError(t, err)
			escaped = !strings.Contains(string(groups), "/specql/")
		}
		require.NoError(t, os.WriteFile(gate, []byte("go\n"), 0o600))
		o := c.Wait()
		require.NoError(t, o.Err)
		require.Empty(t, o.Code(), "%v", o.Finished.GetError())
		requireGone(t, pid)
		if escaped {
			require.Contains(t, strings.Join(o.Lines("runner"), "\n"), "had left its control group")
		}
	})
}

func TestCancelEndsWhatEscaped(t *testing.T) {
	withAndWithout(t, func(t *testing.T, s *shell) {
		path := fifo(t)
		gate := path + ".gate"
		require.NoError(t, syscall.Mkfifo(gate, 0o600))
		c := runnertest.Begin(t, s.client, s.job(sh(escape(path, gate)).in(filepath.Dir(path))))
		pid := pidFrom(t, path)
		c.Cancel("enough")
		require.Equal(t, "CANCELLED", c.Wait().Code())
		requireGone(t, pid)
	})
}

func TestADaemonGoesWithItsOwnJob(t *testing.T) {
	withAndWithout(t, func(t *testing.T, s *shell) {
		path := fifo(t)
		gate := path + ".gate"
		require.NoError(t, syscall.Mkfifo(gate, 0o600))
		require.NoError(t, syscall.Mkfifo(path+"2", 0o600))
		c := runnertest.Begin(t, s.client, s.job(sh(daemonize(path)+"; env -i "+daemonize(path+"2")+"; read -r x <"+gate).in(filepath.Dir(path))))
		daemon := pidFrom(t, path)
		bare := pidFrom(t, path+"2")
		s.ok(sh("true"))
		require.Contains(t, processes(), daemon, "another job's end is not its end")
		require.Contains(t, processes(), bare)
		require.NoError(t, os.WriteFile(gate, []byte("go\n"), 0o600))
		require.Empty(t, c.Wait().Code())
		requireGone(t, daemon)
		requireGone(t, bare)
	})
}

func TestInputNeverBecomesCode(t *testing.T) {
	s := newShell(t, Options{})
	dir := t.TempDir()
	tool := filepath.Join(dir, "tool")
	require.NoError(t, os.Symlink("/bin/sh", tool))
	marker := filepath.Join(dir, "ran")
	allowed := []string{"/bin/sh", "/usr/bin/python3", "/usr/bin/perl", "/usr/bin/env", "/usr/bin/echo", tool}
	run := func(argv ...string) call {
		return call{Policy: Policy{AllowedCommands: allowed}, Operation: Operation{Command: argv}, Input: map[string]any{"text": "x; touch " + marker, "flag": "-c", "py": "-cimport os"}}
	}
	for _, argv := range [][]string{
		{"/bin/sh", "-c", "echo $input.text"},
		{"sh", "-ec", "echo $input.text"},
		{"/usr/bin/python3", "-c", "print('$input.text')"},
		{"/usr/bin/perl", "-e", "$input.text"},
		{"/usr/bin/env", "sh", "-c", "$input.text"},
		{tool, "-c", "$input.text"},
		{"/bin/sh", "$input.flag", "$input.text"}, // what the argument becomes counts
		{"/usr/bin/python3", "$input.py"},
	} {
		s.fails(run(argv...), "VALIDATION", "into code", "$1")
	}
	require.NoFileExists(t, marker)
	require.Equal(t, "x; touch "+marker+"\n", s.ok(run("/bin/sh", "-c", `echo "$1"`, "name", "$input.text"))["stdout"])
	require.Equal(t, "-c\n", s.ok(run("/usr/bin/env", "echo", "$input.flag"))["stdout"])
	require.NoFileExists(t, marker)
}

func TestEnvironmentTakesScalars(t *testing.T) {
	s := newShell(t, Options{})
	j := s.job(sh(`echo "$PORT $RATIO $DEBUG $NAME"`))
	j.Service.RunnerConfig = []byte(`{"environment":{"PORT":8080,"RATIO":1.50,"DEBUG":true,"NAME":"x"}}`)
	o := runnertest.Execute(t, s.client, j)
	require.NoError(t, o.Err)
	require.Empty(t, o.Code(), "%v", o.Finished.GetError())
	require.Equal(t, "8080 1.50 true x\n", output(t, o)["stdout"])
	j = s.job(sh(`true`))
	j.Service.RunnerConfig = []byte(`{"environment":{"PORT":[8080]}}`)
	o = runnertest.Execute(t, s.client, j)
	require.NoError(t, o.Err)
	require.Equal(t, "VALIDATION", o.Code())
}

// One file system below a working directory that cannot map users leaves the others mapped.
func TestFilesAreTheJobsBesideAForeignMount(t *testing.T) {
	require.Zero(t, os.Getuid(), "run as root: only root mounts")
	s := newShell(t, Options{})
	require.True(t, s.r.box.contained(), "the kernel gives name spaces, which alone map users")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "own"), []byte("mine"), 0o600))
	below := filepath.Join(dir, "below")
	require.NoError(t, os.Mkdir(below, 0o700))
	require.NoError(t, unix.Mount("proc", below, "proc", unix.MS_RDONLY, "")) // proc maps no users
	t.Cleanup(func() { require.NoError(t, unix.Unmount(below, unix.MNT_DETACH)) })
	out := s.ok(call{
		Config: Config{WorkingDirectory: dir}, Policy: Policy{AllowedCommands: []string{"/usr/bin/cat"}},
		Operation: Operation{Command: []string{"/usr/bin/cat", "own"}},
	})
	require.Equal(t, "mine", out["stdout"])
}

package dockerrunner

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
)

// sinkFunc takes log lines.
type sinkFunc func(stream, line string)

func (f sinkFunc) Log(stream, line string)         { f(stream, line) }
func (f sinkFunc) Usage(_ *runnerv1.ResourceUsage) {}
func (f sinkFunc) Secret(_ string)                 {}

// cleanup is a context for what is done when a test's own has ended.
func cleanup(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// crashingRunner makes this test binary a runner that carries out one job and waits to be killed.
// Its value is the image; the state directory and the job's id follow as arguments.
const crashingRunner = "SPECQL_TEST_CRASHING_RUNNER"

func crash() int {
	r, err := New(Options{StateDir: os.Args[1]})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if len(os.Args) == 3 {
		return crashAhead(r, os.Args[2])
	}
	config, err := json.Marshal(Config{
		Image: os.Getenv(crashingRunner), Command: []string{"ignore-signals"},
		Volumes: []Volume{{HostPath: os.Args[3], ContainerPath: "/data", Mode: "rw"}},
	})
	if err != nil {
		return 1
	}
	res, err := r.Execute(context.Background(), &runner.Job{
		ID: os.Args[2],
		Service: runner.Service{
			Config: config, Policy: json.RawMessage(`{"allowed_images":["specql-test/*"],"volume_restrictions":{"allowed_host_paths":["/"]}}`),
		},
	}, sinkFunc(func(_, line string) { fmt.Println(line) }))
	fmt.Println("ended", res, err)
	return 1
}

// crashAhead keeps a container created ahead.
func crashAhead(r *Runner, service string) int {
	config, err := json.Marshal(Config{Image: os.Getenv(crashingRunner), Command: []string{"args"}, CreatedAhead: 1})
	if err != nil {
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	res, err := r.Execute(ctx, &runner.Job{
		ID: service, Service: runner.Service{Name: service, Config: config, Policy: json.RawMessage(`{"allowed_images":["specql-test/*"]}`)},
	}, sinkFunc(func(string, string) {}))
	r.ahead.work.Wait()
	fmt.Println("created", res.Err, err)
	<-ctx.Done()
	return 1
}

func TestLeftoversOfACrashedRunner(t *testing.T) {
	needEngine(t)
	state := filepath.Join(t.TempDir(), "state")
	id := "job-" + randomName()
	data := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(data, "precious"), nil, 0o600))
	cmd := exec.CommandContext(t.Context(), os.Args[0], state, id, data) //nolint:gosec // this very test
	cmd.Env = append(os.Environ(), crashingRunner+"="+shared.image)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for _, left := range containersOf(t, id) {
			require.NoError(t, shared.runner.removeContainer(cleanup(t), left))
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "sleeping\n", line)

	// Others leave a living runner's things alone.
	r := newRunner(t, Options{StateDir: state})
	_, err = r.Sweep(t.Context())
	require.NoError(t, err)
	require.Len(t, containersOf(t, id), 1)
	instances, err := os.ReadDir(state)
	require.NoError(t, err)
	require.Len(t, instances, 1)
	groups := groupsOf(t, cmd.Process.Pid)
	require.NotEmpty(t, groups)

	volume, err := filepath.Glob(filepath.Join(state, "*", heldPrefix+"*", "precious"))
	require.NoError(t, err)
	require.Len(t, volume, 1)

	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Len(t, containersOf(t, id), 1, "the container outlives its runner")
	// The runners' own search may be quicker than this one.
	require.Eventually(t, func() bool {
		_, err := r.Sweep(t.Context())
		left, _ := os.ReadDir(state)
		return err == nil && len(containersOf(t, id)) == 0 && len(left) == 0 && len(groupsOf(t, cmd.Process.Pid)) == 0
	}, 20*time.Second, 10*time.Millisecond)
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), state)
	require.FileExists(t, filepath.Join(data, "precious"), "what was mounted is not the runner's to remove")
}

// groupsOf lists the control groups of a process's jobs.
func groupsOf(t *testing.T, pid int) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/specql/", "/sys/fs/cgroup/specql/"} {
		names, err := filepath.Glob(pattern + groupParent + "-" + strconv.Itoa(pid) + "-*")
		require.NoError(t, err)
		found = append(found, names...)
	}
	return found
}

func TestExpiredContainerOfAnotherHost(t *testing.T) {
	needEngine(t)
	r := newRunner(t, Options{})
	other := owner{instance: randomName(), host: "elsewhere/boot/pids", process: "1/1"}
	leave := func(job string, deadline time.Time) {
		_, err := r.create(t.Context(), client.ContainerCreateOptions{
			Name:       "specql-test-" + randomName(),
			Config:     &container.Config{Image: shared.image, Labels: other.labels(job, deadline)},
			HostConfig: &container.HostConfig{NetworkMode: networkNone},
		})
		require.NoError(t, err)
	}
	lives, over := "job-"+randomName(), "job-"+randomName()
	leave(lives, time.Now())
	leave(over, time.Now().Add(-expiryGrace-time.Minute))
	_, err := r.Sweep(t.Context())
	require.NoError(t, err)
	require.Empty(t, containersOf(t, over))
	left := containersOf(t, lives)
	require.Len(t, left, 1)
	require.NoError(t, r.removeContainer(t.Context(), left[0]))
}

func TestDeadNeverGuesses(t *testing.T) {
	me, err := newOwner()
	require.NoError(t, err)
	now := time.Now()
	require.False(t, me.dead(me.labels("j", now.Add(-time.Hour)), now), "its own")
	sibling := me
	sibling.instance = "other"
	require.False(t, me.dead(sibling.labels("j", time.Time{}), now), "another runner of this process")
	gone := sibling
	gone.process = strconv.Itoa(os.Getpid()) + "/1"
	require.True(t, me.dead(gone.labels("j", time.Time{}), now), "the id belongs to another process now")
	gone.host = "elsewhere"
	require.False(t, me.dead(gone.labels("j", time.Time{}), now))
	require.False(t, me.dead(map[string]string{labelHost: me.host, labelProcess: "nonsense"}, now))
	require.False(t, me.dead(map[string]string{labelHost: me.host, labelProcess: "-1/1"}, now))
	require.False(t, me.dead(nil, now))
}

func TestStateDirectoryOfOthersIsRefused(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o777)) //nolint:gosec // that is what is tested
	s := newStateDir(dir, owner{instance: "a"})
	_, err := s.newDir(1 << 20)
	require.ErrorContains(t, err, "only its owner can write")
}

func TestCloseLeavesNothing(t *testing.T) {
	needEngine(t)
	state := filepath.Join(t.TempDir(), "state")
	r, err := New(Options{StateDir: state})
	require.NoError(t, err)
	require.Equal(t, "probe", decoded(t, call{}.runOn(t, r))["program"])
	mode, _ := cgroup.Detect()
	require.NotEqual(t, cgroup.None, mode)
	r.Close()
	left, err := os.ReadDir(state)
	require.NoError(t, err)
	require.Empty(t, left)
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), state)
}

// What is mounted at a volume's place is not the runner's: it stays, even where it cannot be unmounted.
func TestVolumesAreNotRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "instance")
	precious := filepath.Join(dir, heldPrefix+"x", "precious")
	require.NoError(t, os.MkdirAll(filepath.Dir(precious), 0o700))
	require.NoError(t, os.WriteFile(precious, nil, 0o600))
	require.Error(t, removeInstance(dir))
	require.FileExists(t, precious)
}

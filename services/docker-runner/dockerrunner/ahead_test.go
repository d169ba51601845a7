package dockerrunner

import (
	"bufio"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

// spares lists the containers that a runner has created ahead, once it creates no more, as the engine knows them.
func spares(t *testing.T, r *Runner) []string {
	t.Helper()
	r.ahead.work.Wait()
	list, err := r.client.ContainerList(cleanup(t), client.ContainerListOptions{
		All: true, Filters: make(client.Filters).Add("label", labelAhead).Add("label", labelRunner+"="+r.owner.instance).Add("status", "created"),
	})
	require.NoError(t, err)
	ids := []string{}
	for _, c := range list.Items {
		ids = append(ids, c.ID)
	}
	slices.Sort(ids)
	return ids
}

func aheadOf(n int, config object) object {
	all := object{"created_ahead": n}
	maps.Copy(all, config)
	return all
}

// aheadRunner is a runner of a test's own.
func aheadRunner(t *testing.T) *Runner {
	t.Helper()
	needEngine(t)
	return newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
}

func TestCreatedAheadIsUsedOnce(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	require.Empty(t, spares(t, r))
	seen := map[string]bool{}
	var before []string
	for n := range 4 {
		out := call{args: []string{"echo-input"}, config: aheadOf(2, nil), input: object{"n": n}}.runOn(t, r)
		require.Equal(t, object{"stdin": object{"n": float64(n)}, "same": false, "args": []any{}}, decoded(t, out))
		now := spares(t, r)
		require.Len(t, now, 2)
		if n > 0 {
			kept := slices.DeleteFunc(slices.Clone(now), func(id string) bool { return !slices.Contains(before, id) })
			require.Len(t, kept, 1, "one was used, and is gone")
		}
		for _, id := range before {
			if !slices.Contains(now, id) {
				require.False(t, seen[id])
				seen[id] = true
			}
		}
		before = now
	}
	require.Len(t, seen, 3)
}

func TestWhatIsCreatedAheadIsHeldAndMeasuredAlike(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	burn := call{args: []string{"burn", "200ms"}, config: aheadOf(1, nil), policy: object{"resource_limits": object{"memory_mb": 64}}}
	own := burn.runOn(t, r)
	before := spares(t, r)
	require.Len(t, before, 1)
	ahead := burn.runOn(t, r)
	require.NotContains(t, spares(t, r), before[0])
	decoded(t, own)
	decoded(t, ahead)
	require.Equal(t, own.Finished.GetSecurity(), ahead.Finished.GetSecurity())
	u := ahead.Finished.GetUsage()
	require.Equal(t, own.Finished.GetUsage().GetSource(), u.GetSource())
	require.Equal(t, own.Finished.GetUsage().GetExecutedVersion(), u.GetExecutedVersion())
	require.InDelta(t, 0.25, u.GetCpuSeconds(), 0.2)
	require.Greater(t, u.GetPeakMemoryMb(), 0.5)

	hog := call{args: []string{"hog", "200"}, config: aheadOf(1, nil), policy: object{"resource_limits": object{"memory_mb": 48}}}
	for range 2 {
		out, message := failed(t, hog.runOn(t, r), "RESOURCE_EXCEEDED")
		require.Contains(t, message, "its limit is 48 MiB")
		require.True(t, out.Finished.GetUsage().GetOomKilled())
		require.Len(t, spares(t, r), 1)
	}
}

func TestJobFile(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	look := func(id string) {
		out := call{args: []string{"read", "/specql/job.json"}, config: aheadOf(1, nil), id: id}.runOn(t, r)
		require.Len(t, spares(t, r), 1)
		var told map[string]string
		text, ok := decoded(t, out)["text"].(string)
		require.True(t, ok)
		require.NoError(t, json.Unmarshal([]byte(text), &told))
		require.Equal(t, id, told["job_id"])
		require.Equal(t, "run-1", told["run_id"])
		require.Equal(t, "key-1", told["idempotency_key"])
	}
	look("job-a-" + randomName())
	look("job-b-" + randomName())
	forged := hostileImage(t, []string{`ENV SPECQL_JOB_ID=forged SPECQL_INPUT=forged SPECQL_JOB_FILE=/forged TRACEPARENT=forged`})
	env := call{args: []string{"env"}, config: aheadOf(1, object{"image": forged, "environment": object{"MODE": "x"}})}
	for range 2 {
		got := decoded(t, env.runOn(t, r))
		require.Equal(t, "x", got["MODE"])
		require.Equal(t, "/specql/job.json", got["SPECQL_JOB_FILE"])
		for _, name := range []string{"SPECQL_INPUT", "SPECQL_JOB_ID", "SPECQL_RUN_ID", "SPECQL_IDEMPOTENCY_KEY", "TRACEPARENT"} {
			require.NotContains(t, got, name)
		}
		require.Len(t, spares(t, r), 1)
	}
	// An engine that does not see the runner's files has it copied.
	e, err := r.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	r.engine.Store(&engine{info: e.info})
	look("job-c-" + randomName())
	look("job-d-" + randomName())
	out := call{args: []string{"write", "/specql/output.json", `{"written": true}`}, config: aheadOf(1, object{"user": "1234"})}
	for range 2 {
		require.Equal(t, object{"written": true}, decoded(t, out.runOn(t, r)))
		require.Len(t, spares(t, r), 1)
	}
}

// TestJobFileIsReadable: by any user of the container, under whatever mask the runner was started. It is alone, since the mask is the process's.
func TestJobFileIsReadable(t *testing.T) { //nolint:paralleltest // see above
	defer unix.Umask(unix.Umask(0o077))
	place := outputPlace{dir: jobDir{path: t.TempDir()}}
	require.NoError(t, place.prime(t.Context(), nil, "", []byte("{}")))
	info, err := os.Stat(filepath.Join(place.dir.path, jobFile))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o444), info.Mode())
}

// What a container was created by is what its job is held to.
func TestChangesDropWhatWasCreatedAhead(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	tag := "specql-test/ahead:" + randomName()
	build := func(content string) {
		files := map[string][]byte{"/probe": shared.binary, "/version": []byte(content)}
		require.NoError(t, imagebuild.FromBinary(t.Context(), "", tag, files, []string{"/probe"}))
	}
	build("1")
	t.Cleanup(func() { require.NoError(t, imagebuild.Remove(cleanup(t), "", tag)) })
	c := call{args: []string{"read", "/version"}, config: aheadOf(1, object{"image": tag})}
	var old []string
	runs := func(text string) {
		t.Helper()
		require.Equal(t, object{"text": text}, decoded(t, c.runOn(t, r)))
		now := spares(t, r)
		require.Len(t, now, 1)
		if len(old) > 0 {
			require.NotContains(t, now, old[0])
		}
		old = now
		for _, id := range old {
			found, err := r.client.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{})
			require.NoError(t, err)
			require.Subset(t, found.Container.Config.Env, []string{"SPECQL_JOB_FILE=/specql/job.json"})
		}
	}
	runs("1")
	first, err := r.client.ImageInspect(t.Context(), tag)
	require.NoError(t, err)
	build("2")
	runs("2")
	// While a container is created of an image, the engine keeps it: this one has lost its name only.
	_, err = r.client.ImageRemove(t.Context(), first.ID, client.ImageRemoveOptions{})
	require.NoError(t, err, "nothing holds the image any more")
	c.config["environment"] = object{"PASSWORD": "first"}
	runs("2")
	c.config["environment"] = object{"PASSWORD": "second"}
	runs("2")
	found, err := r.client.ContainerInspect(t.Context(), old[0], client.ContainerInspectOptions{})
	require.NoError(t, err)
	require.Contains(t, found.Container.Config.Env, "PASSWORD=second")
	c.policy = object{"resource_limits": object{"memory_mb": 32}}
	runs("2")
	found, err = r.client.ContainerInspect(t.Context(), old[0], client.ContainerInspectOptions{})
	require.NoError(t, err)
	require.EqualValues(t, 32<<20, found.Container.HostConfig.Memory)
	// A policy that forbids the image has the job refused, whatever was created before.
	c.policy = object{"allowed_images": []string{"other/*"}}
	failed(t, c.runOn(t, r), "POLICY_VIOLATION")
	require.Empty(t, spares(t, r))
	c.policy = nil
	runs("2")
	c.config["created_ahead"] = 0
	require.Equal(t, object{"text": "2"}, decoded(t, c.runOn(t, r)))
	require.Empty(t, spares(t, r), "a service that asks for none any more keeps none")
}

func TestNobodyNeedsWhatWasCreatedAhead(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	c := call{args: []string{"echo-input"}, config: aheadOf(1, nil)}
	decoded(t, c.runOn(t, r))
	first := spares(t, r)
	require.Len(t, first, 1)

	// Somebody has pruned it.
	require.NoError(t, r.removeContainer(t.Context(), first[0]))
	decoded(t, c.runOn(t, r))
	second := spares(t, r)
	require.Len(t, second, 1)

	// A job that may take longer than the labels say has a container of its own.
	job := c.job(t)
	job.Timeout = durationpb.New(48 * time.Hour)
	out := runnertest.Execute(t, runnertest.Start(t, r), job)
	decoded(t, out)
	third := spares(t, r)
	require.Len(t, third, 1)
	require.NotEqual(t, second, third)

	r.ahead.expire(time.Now().Add(aheadLifetime - time.Second))
	require.Equal(t, third, spares(t, r))
	groups := spareGroups(t, r)
	require.NotEmpty(t, groups)
	r.ahead.expire(time.Now().Add(aheadLifetime + time.Second))
	require.Empty(t, spares(t, r))
	require.Empty(t, r.ahead.shelves)
	require.Zero(t, r.ahead.count)
	entries, err := os.ReadDir(r.state.own())
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing but the owner is left")
	for _, group := range groups {
		require.NoDirExists(t, group)
	}
}

// spareGroups are the control groups of the containers that were created ahead.
func spareGroups(t *testing.T, r *Runner) []string {
	t.Helper()
	r.ahead.mu.Lock()
	defer r.ahead.mu.Unlock()
	var found []string
	for _, s := range r.ahead.shelves {
		for _, spare := range s.spares {
			for _, top := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
				names, err := filepath.Glob(filepath.Join(top, spare.group.Path()))
				require.NoError(t, err)
				found = append(found, names...)
			}
		}
	}
	return found
}

func TestDrainDropsWhatWasCreatedAhead(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	c := call{args: []string{"sleep", "1ms"}, config: aheadOf(3, nil)}
	decoded(t, c.runOn(t, r))
	require.Len(t, spares(t, r), 3)
	// The server of the last call has drained; this one begins to while a job runs.
	server := runnertest.Start(t, r)
	c.args = []string{"ignore-signals"}
	running := runnertest.Begin(t, server, c.job(t))
	running.Line("sleeping")
	r.Draining()
	require.Empty(t, spares(t, r))
	running.Cancel("seen")
	require.Equal(t, "CANCELLED", running.Wait().Code())
	require.Empty(t, spares(t, r), "none is created any more")
	decoded(t, call{args: []string{"args"}, config: aheadOf(3, nil)}.runOn(t, r))
	require.Empty(t, spares(t, r))
}

func TestCreatedAheadManyAtOnce(t *testing.T) {
	t.Parallel()
	r := aheadRunner(t)
	server := runnertest.Start(t, r)
	var calls []*runnertest.Call
	for n := range 8 {
		calls = append(calls, runnertest.Begin(t, server, call{args: []string{"echo-input"}, config: aheadOf(3, nil), input: object{"n": n}}.job(t)))
	}
	for n, c := range calls {
		require.Equal(t, object{"n": float64(n)}, decoded(t, c.Wait())["stdin"])
	}
	require.Len(t, spares(t, r), 3)
}

func TestCreatedAheadIsRefused(t *testing.T) {
	t.Parallel()
	service := func(config object, command ...string) []runner.Problem {
		config["image"] = "specql-test/x"
		return checkService(&runner.Service{
			Name: "s", Config: raw(t, config), Policy: raw(t, object{"allowed_images": []string{"specql-test/*"}}),
			Operations: []runner.Operation{{Name: "op", Config: raw(t, object{"command": command})}},
		}, nil, nil)
	}
	require.Empty(t, service(object{"created_ahead": 16}, "run", "$$input.x"))
	require.Empty(t, service(object{"created_ahead": 0}, "run", "$input.x"))
	for _, c := range []struct {
		path  string
		found []runner.Problem
	}{
		{"runner_config.created_ahead", service(object{"created_ahead": 17}, "run")},
		{"runner_config.created_ahead", service(object{"created_ahead": -1}, "run")},
		{"runner_config.created_ahead", service(object{"created_ahead": 1, "volumes": []object{{"host_path": "/srv/x", "container_path": "/x"}}}, "run")},
		{"runner_config.command[1]", service(object{"created_ahead": 1, "command": []string{"run", "$input.x"}}, "run")},
		{"operations.op.command[1]", service(object{"created_ahead": 1}, "run", "$input.x")},
		{"operations.op.command[0]", service(object{"created_ahead": 1}, "a$input")},
	} {
		require.NotEmpty(t, c.found, c.path)
		require.Equal(t, c.path, c.found[0].Path)
		require.False(t, c.found[0].Warning)
	}
	// And where a job comes with it.
	needEngine(t)
	_, message := failed(t, call{args: []string{"args", "$input.x"}, config: aheadOf(1, nil), input: object{"x": 1}}.run(t), "VALIDATION")
	require.Contains(t, message, "has its arguments before there is an input")
}

func TestLeftoversCreatedAhead(t *testing.T) {
	needEngine(t)
	state := filepath.Join(t.TempDir(), "state")
	service := "job-" + randomName()
	cmd := exec.CommandContext(t.Context(), os.Args[0], state, service) //nolint:gosec // this very test
	cmd.Env = append(os.Environ(), crashingRunner+"="+shared.image)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	left := func() []string {
		list, err := shared.runner.client.ContainerList(cleanup(t), client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("label", labelAhead+"="+service+".")})
		require.NoError(t, err)
		var ids []string
		for _, c := range list.Items {
			ids = append(ids, c.ID)
		}
		return ids
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		for _, id := range left() {
			require.NoError(t, shared.runner.removeContainer(cleanup(t), id))
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "created <nil> <nil>\n", line)
	require.Len(t, left(), 1)
	require.NotEmpty(t, groupsOf(t, cmd.Process.Pid))
	r := newRunner(t, Options{StateDir: state})
	_, err = r.Sweep(t.Context())
	require.NoError(t, err)
	require.Len(t, left(), 1, "a living runner's are left alone")
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Eventually(t, func() bool {
		_, err := r.Sweep(t.Context())
		entries, _ := os.ReadDir(state)
		return err == nil && len(left()) == 0 && len(entries) == 0 && len(groupsOf(t, cmd.Process.Pid)) == 0
	}, 20*time.Second, 10*time.Millisecond)
}

package dockerrunner

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// dropIdleConnections closes the connections to the engine that nobody uses, again and again:
// what is left then is a leak.
func dropIdleConnections(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			_ = shared.runner.client.Close()
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		done.Wait()
	})
}

func TestConformance(t *testing.T) {
	needEngine(t)
	dropIdleConnections(t)
	runnertest.Conformance(t, shared.runner, runnertest.Cases{
		Good:     call{args: []string{"echo-input"}, input: object{"name": "ada"}}.job(t),
		Slow:     call{args: []string{"ignore-signals"}}.job(t),
		SlowLine: "sleeping",
		Big:      call{args: []string{"flood"}}.job(t),
		Gone: func(t *testing.T) {
			t.Helper()
			list, err := shared.runner.client.ContainerList(t.Context(), client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("label", labelRunner+"="+shared.runner.owner.instance)})
			require.NoError(t, err)
			require.Empty(t, list.Items, "no container of the runner is left")
			dirs, err := filepath.Glob(filepath.Join(shared.runner.state.own(), "*", "*"))
			require.NoError(t, err)
			require.Empty(t, dirs)
		},
	})
}

func TestInputReachesTheContainer(t *testing.T) {
	t.Parallel()
	input := object{"name": "ada's $(reboot) \"file\"", "list": []any{1, object{"x": 2.5}}, "big": 12345678901234567}
	out := call{
		args:  []string{"echo-input", "--name=$input.name", "$input.list[1]", "$input.list[0]", "$inputs", "$input.big", "$$input.name"},
		input: input,
	}.output(t)
	require.Equal(t, true, out["same"])
	require.Equal(t, input["name"], out["stdin"].(object)["name"])
	require.Equal(t, []any{"--name=ada's $(reboot) \"file\"", `{"x":2.5}`, "1", "$inputs", "12345678901234567", "$input.name"}, out["args"])
}

func TestLargeInputComesByStdinAlone(t *testing.T) {
	t.Parallel()
	out := call{args: []string{"count-input"}, input: object{"text": strings.Repeat("x", 1<<20)}}.output(t)
	require.Greater(t, out["bytes"], float64(1<<20))
	require.Equal(t, false, out["variable"])
	require.Equal(t, "1", out["too_large"])
	// Nobody reads the input here.
	require.Equal(t, "plain text\n", call{args: []string{"text"}, input: object{"text": strings.Repeat("x", 1<<20)}}.output(t)["stdout"])
}

func TestEnvironmentIsCleanAndComplete(t *testing.T) {
	t.Setenv("RUNNER_SECRET", "do-not-leak")
	out := call{args: []string{"env"}, config: object{"environment": object{"MODE": "test", "PORT": 8080, "DEBUG": true, "RATIO": json.Number("1.50")}}, id: "job-env"}.output(t)
	require.Equal(t, "test", out["MODE"])
	require.Equal(t, "8080", out["PORT"])
	require.Equal(t, "true", out["DEBUG"])
	require.Equal(t, "1.50", out["RATIO"])
	require.Equal(t, "job-env", out["SPECQL_JOB_ID"])
	require.Equal(t, "run-1", out["SPECQL_RUN_ID"])
	require.Equal(t, "key-1", out["SPECQL_IDEMPOTENCY_KEY"])
	require.Equal(t, "{}", out["SPECQL_INPUT"])
	for name := range out {
		require.Contains(t, []string{"MODE", "PORT", "DEBUG", "RATIO", "SPECQL_JOB_ID", "SPECQL_RUN_ID", "SPECQL_IDEMPOTENCY_KEY", "SPECQL_INPUT", "TRACEPARENT", "PATH", "HOME", "HOSTNAME"}, name)
	}
}

func TestOutputOfStreams(t *testing.T) {
	t.Parallel()
	require.Equal(t, object{"answer": 42.0}, call{args: []string{"last-line"}}.output(t))
	require.Equal(t, object{"stdout": "plain text\n", "stderr": "a remark\n", "exit_code": 0.0}, call{args: []string{"text"}}.output(t))
	require.Equal(t, "\ufffdx\n\ufffd", call{args: []string{"binary"}}.output(t)["stdout"])

	lines := call{args: []string{"lines"}}.run(t)
	require.Equal(t, []string{"first", "third without end"}, lines.Lines("stdout"))
	require.Equal(t, []string{"second"}, lines.Lines("stderr"))

	long := call{args: []string{"long-line"}}.run(t)
	require.Len(t, long.Lines("stdout"), 1)
	require.Len(t, decoded(t, long)["stdout"], 100<<10)
}

func TestServiceCommandAndImageEntrypoint(t *testing.T) {
	t.Parallel()
	require.Equal(t, object{"program": "probe"}, call{}.output(t))
	require.Equal(t, object{"args": []any{"a b"}}, call{config: object{"command": []string{"args", "a b"}}}.output(t))
	out := call{args: []string{"args", "over"}, config: object{"entrypoint": []string{"/probe"}, "command": []string{"exit", "3"}}}.output(t)
	require.Equal(t, object{"args": []any{"over"}}, out)
}

func TestFailingContainer(t *testing.T) {
	t.Parallel()
	out, message := call{args: []string{"exit", "7"}}.fails(t, "REMOTE_ERROR")
	require.Equal(t, "the container exited with status 7: this went wrong", message)
	require.False(t, out.Finished.GetError().GetRetryable())
	require.EqualValues(t, 7, out.Finished.GetUsage().GetExitCode())
	require.False(t, out.Finished.GetUsage().GetOomKilled())

	_, message = call{config: object{"entrypoint": []string{"/no-such-program"}}}.fails(t, "REMOTE_ERROR")
	require.Contains(t, message, "127")
	_, message = call{config: object{"user": "nobody-here"}}.fails(t, "VALIDATION")
	require.Contains(t, message, "user")
	_, message = call{args: []string{"$input.nam"}, input: object{"name": 1}}.fails(t, "VALIDATION")
	require.Contains(t, message, `it has: name`)
}

// outputs runs the cases of output.json on a runner.
func outputs(t *testing.T, r *Runner) {
	t.Helper()
	const file = "/specql/output.json"
	run := func(args ...string) *runnertest.Outcome { return call{args: args}.runOn(t, r) }

	require.Equal(t, object{"a": 1.0}, decoded(t, run("write", file, `{"a": 1}`)))
	require.Equal(t, object{"a": 1.0}, decoded(t, call{args: []string{"write", file, `{"a":1}`}, config: object{"user": "65534:65534"}}.runOn(t, r)), "any user may write it")
	_, message := failed(t, run("write", file, `{"a":`), "VALIDATION")
	require.Contains(t, message, "not valid JSON")
	_, message = failed(t, run("write-latin1", file), "VALIDATION")
	require.Contains(t, message, "UTF-8")
	_, message = failed(t, run("write-deep", file), "VALIDATION")
	require.Contains(t, message, "nested deeper")
	_, message = failed(t, run("write-sparse", file), "RESOURCE_EXCEEDED")
	require.Contains(t, message, "4 MiB")
	// What was written into another file is no output.
	require.Contains(t, decoded(t, run("write", "/specql/other.json", `{"a":1}`)), "exit_code")
}

func TestOutputFile(t *testing.T) {
	t.Parallel()
	outputs(t, shared.runner)
	const file = "/specql/output.json"
	require.Equal(t, object{"b": 1.0}, call{args: []string{"write-rename", file, `{"b":1}`}}.output(t))
	for _, args := range [][]string{{"symlink", "/etc/passwd", file}, {"symlink", "/specql/gone", file}, {"fifo", file}, {"mkdir", file}} {
		_, message := call{args: args}.fails(t, "VALIDATION")
		require.Contains(t, message, "not a regular file", "%v", args)
	}
	out := call{args: []string{"fill", "/specql/full"}}.output(t)
	require.Contains(t, out["error"], "no space left")
	require.LessOrEqual(t, out["bytes"], float64(defaultOutputQuota), "the directory is bounded")
}

// An engine on another host is treated like this one when it does not see the runner's files.
func TestOutputFileOfADistantEngine(t *testing.T) {
	t.Parallel()
	needEngine(t)
	r := newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
	e, err := r.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	*e = engine{info: e.info}
	outputs(t, r)
	out := call{args: []string{"burn", "300ms"}}.runOn(t, r)
	require.Equal(t, "docker", out.Finished.GetUsage().GetSource())
	require.NotContains(t, out.Finished.GetSecurity().GetIsolation(), "cgroup")
	volumes, err := r.client.VolumeList(t.Context(), client.VolumeListOptions{Filters: make(client.Filters).Add("label", labelRunner)})
	require.NoError(t, err)
	require.Empty(t, volumes.Items)
}

func TestContainerHasNoPrivileges(t *testing.T) {
	t.Parallel()
	out := call{args: []string{"status"}}.run(t)
	status := decoded(t, out)
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		require.Equal(t, "0000000000000000", status[set], set)
	}
	require.Equal(t, "1", status["NoNewPrivs"])
	require.Equal(t, "2", status["Seccomp"], "a filter is in force")
	require.Equal(t, "job", status["hostname"])
	require.Subset(t, out.Finished.GetSecurity().GetIsolation(), []string{"capabilities_dropped", "no_new_privileges", "seccomp", "read_only_root", "no_network", "cgroup"})

	tried := call{args: []string{"try", "/", "/etc", "/tmp", "/specql", "/dev/shm"}}.output(t)
	for what, how := range tried {
		switch what {
		case "/tmp", "/specql", "/dev/shm":
			require.Equal(t, "<nil>", how, what)
		case "/":
			require.Contains(t, how, "read-only file system")
		default:
			require.NotEqual(t, "<nil>", how, what)
		}
	}
	writable := call{args: []string{"try", "/"}, config: object{"read_only": false, "user": "0"}}.output(t)
	require.Equal(t, "<nil>", writable["/"])
	require.Equal(t, "1000", call{args: []string{"status"}, config: object{"user": "1000:1000"}}.output(t)["uid"])
}

func TestNetworks(t *testing.T) {
	t.Parallel()
	require.Equal(t, object{"names": []any{"lo"}}, call{args: []string{"interfaces"}}.output(t))
	for _, mode := range []string{"host", "container:abc", "ns:/proc/1/ns/net"} {
		out, message := call{config: object{"network_mode": mode}, policy: object{"allowed_networks": []string{mode}}}.fails(t, "POLICY_VIOLATION")
		require.Contains(t, message, "never shared")
		require.False(t, out.Finished.GetSecurity().GetChecks()[0].GetAllowed())
	}
	_, message := call{config: object{"network_mode": "bridge"}}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, `add "bridge" to allowed_networks`)
	_, message = call{config: object{"network_mode": "no-such-net"}, policy: object{"allowed_networks": []string{"no-such-net"}}}.fails(t, "VALIDATION")
	require.Contains(t, message, "docker network create")

	needEngine(t)
	name := "specql-test-" + randomName()
	made, err := shared.runner.client.NetworkCreate(t.Context(), name, client.NetworkCreateOptions{Driver: "bridge"})
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := shared.runner.client.NetworkRemove(cleanup(t), made.ID, client.NetworkRemoveOptions{})
		require.NoError(t, err)
	})
	out := call{args: []string{"interfaces"}, config: object{"network_mode": name}, policy: object{"allowed_networks": []string{name}}}.output(t)
	require.Contains(t, out["names"], "eth0")
	_, message = call{config: object{"network_mode": made.ID}, policy: object{"allowed_networks": []string{made.ID}}}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, name)
	// The host's network by its ID is no way in either.
	host, err := shared.runner.client.NetworkInspect(t.Context(), "host", client.NetworkInspectOptions{})
	require.NoError(t, err)
	call{config: object{"network_mode": host.Network.ID}, policy: object{"allowed_networks": []string{host.Network.ID}}}.fails(t, "POLICY_VIOLATION")
}

func TestVolumes(t *testing.T) {
	t.Parallel()
	needEngine(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "in.txt"), []byte("hello"), 0o644))
	require.NoError(t, os.Chmod(dir, 0o777)) //nolint:gosec // a container's user writes here
	volume := func(host, mode string) object {
		return object{"volumes": []object{{"host_path": host, "container_path": "/data", "mode": mode}}}
	}
	allow := func(paths ...string) object {
		return object{"volume_restrictions": object{"allowed_host_paths": paths}}
	}

	require.Equal(t, object{"text": "hello"}, call{args: []string{"read", "/data/in.txt"}, config: volume(dir, "ro"), policy: allow(dir)}.output(t))
	_, message := call{args: []string{"write", "/data/out.txt", "x"}, config: volume(dir, "ro"), policy: allow(dir)}.fails(t, "REMOTE_ERROR")
	require.Contains(t, message, "read-only")
	call{args: []string{"write", "/data/out.txt", "x"}, config: volume(dir, "rw"), policy: allow(dir)}.output(t)
	written, err := os.ReadFile(filepath.Join(dir, "out.txt"))
	require.NoError(t, err)
	require.Equal(t, "x", string(written))

	// Without volume_restrictions reading is possible, writing is not.
	require.Equal(t, object{"text": "hello"}, call{args: []string{"read", "/data/in.txt"}, config: volume(dir, "ro")}.output(t))
	_, message = call{config: volume(dir, "rw")}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, "volume_restrictions")
	_, message = call{config: volume(dir, "ro"), policy: allow("/srv/other")}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, dir)
	_, message = call{config: volume(dir, "ro"), policy: object{"volume_restrictions": object{"allowed_host_paths": []string{dir}, "max_volumes": 0}}}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, "max_volumes")
	_, message = call{config: volume(filepath.Join(dir, "gone"), "ro")}.fails(t, "VALIDATION")
	require.Contains(t, message, "does not exist")

	// A link out of what is allowed, one into the system, a socket.
	other := t.TempDir()
	require.NoError(t, os.Symlink(other, filepath.Join(dir, "out")))
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "etc")))
	require.NoError(t, os.Symlink("/var/run/docker.sock", filepath.Join(dir, "innocent")))
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(dir, "service.sock"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	for _, name := range []string{"out", "etc", "innocent", "service.sock"} {
		out, _ := call{config: volume(filepath.Join(dir, name), "ro"), policy: allow(dir)}.fails(t, "POLICY_VIOLATION")
		checks := out.Finished.GetSecurity().GetChecks()
		require.NotEmpty(t, checks)
		require.False(t, checks[len(checks)-1].GetAllowed(), "%s: the denial is on record", name)
	}
	for _, host := range []string{"/", "/var/run/docker.sock", "/run", "/proc", "/sys/fs/cgroup", "/etc/ssl", "/var", "/dev/sda", "/tmp/../etc"} {
		_, message := call{config: volume(host, "ro"), policy: allow("/")}.fails(t, "POLICY_VIOLATION")
		require.Contains(t, message, "never be mounted", host)
	}
}

func TestInputIsNeverCode(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]call{
		"of an operation": {args: []string{"sh", "-c", "echo $input.x"}, input: object{"x": "; reboot"}},
		"of a service":    {config: object{"entrypoint": []string{"/bin/bash", "-c"}, "command": []string{"$input.x"}}, input: object{"x": "reboot"}},
		"by an option":    {args: []string{"python3", "$input.o", "$input.x"}, input: object{"o": "-c", "x": "reboot()"}},
	} {
		out, message := c.fails(t, "VALIDATION")
		require.Contains(t, message, "run as code", name)
		require.Nil(t, out.Finished.GetUsage().ExecutedVersion, name)
	}
}

// volumes of a test: what a service says, and its policy.
func volumes(mode, host string, allowed ...string) (config, policy object) {
	config = object{"volumes": []object{{"host_path": host, "container_path": "/data", "mode": mode}}}
	if allowed == nil {
		return config, object{}
	}
	return config, object{"volume_restrictions": object{"allowed_host_paths": allowed}}
}

// swap makes a directory with a subdirectory x, and a place outside. exchange puts a link to
// the place outside where x is, or x back.
func swap(t *testing.T) (vol, outside string, exchange func() error) {
	t.Helper()
	base := t.TempDir()
	vol, outside = filepath.Join(base, "vol"), filepath.Join(base, "outside")
	for _, dir := range []string{filepath.Join(vol, "x"), outside} {
		require.NoError(t, os.MkdirAll(dir, 0o755)) //nolint:gosec // a container looks at it
	}
	require.NoError(t, os.Symlink(outside, filepath.Join(vol, "y")))
	return vol, outside, func() error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(vol, "x"), unix.AT_FDCWD, filepath.Join(vol, "y"), unix.RENAME_EXCHANGE)
	}
}

func TestWhatWasCheckedIsWhatIsMounted(t *testing.T) {
	t.Parallel()
	needEngine(t)
	e, err := shared.runner.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	if e.reach() != held {
		t.Fatal("run as root: the runner cannot mount here")
	}
	vol, outside, exchange := swap(t)
	require.NoError(t, os.WriteFile(filepath.Join(vol, "x", "mine"), nil, 0o600))
	p := newPolicies(Policy{VolumeRestrictions: &VolumeRestrictions{AllowedHostPaths: []string{vol}}}, nil, nil, &runner.Checks{})
	mounts, err := p.volumes([]Volume{{HostPath: filepath.Join(vol, "x"), ContainerPath: "/data", Mode: "rw"}}, held)
	require.NoError(t, err)
	defer closeMounts(mounts)
	require.NoError(t, exchange())
	a := &attempt{r: shared.runner, policies: p}
	defer a.release()
	require.NoError(t, a.hold(mounts))
	entries, err := os.ReadDir(mounts[0].source)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.Equal(t, "mine", entries[0].Name())
	// Before the runner opens it, a link is seen.
	_, err = p.volumes([]Volume{{HostPath: filepath.Join(vol, "x"), ContainerPath: "/data", Mode: "rw"}}, held)
	require.ErrorContains(t, err, "POLICY_VIOLATION")
	_, err = openHostPath(filepath.Join(vol, "x", "mine"))
	require.ErrorIs(t, err, unix.ENOTDIR)
	require.NoError(t, os.WriteFile(filepath.Join(outside, "mine"), nil, 0o600))
	_, err = openHostPath(filepath.Join(vol, "x", "mine"))
	require.ErrorIs(t, err, unix.ENOTDIR)
}

// A container that may write a directory swaps what another one is about to mount.
func TestVolumeThatIsSwapped(t *testing.T) {
	needEngine(t)
	vol, outside, exchange := swap(t)
	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = exchange()
			}
		}
	})
	config, policy := volumes("rw", filepath.Join(vol, "x"), vol)
	server := runnertest.Start(t, shared.runner)
	ran := 0
	for i := 0; i < 200 && ran < 8; i++ {
		out := runnertest.Execute(t, server, call{args: []string{"write", "/data/written", "x"}, config: config, policy: policy}.job(t))
		if out.Code() == "" {
			ran++
			continue
		}
		require.Contains(t, []string{"POLICY_VIOLATION", "VALIDATION"}, out.Code(), "%v", out.Finished.GetError())
	}
	close(stop)
	swapping.Wait()
	require.Equal(t, 8, ran)
	entries, err := os.ReadDir(outside)
	require.NoError(t, err)
	require.Empty(t, entries, "nothing was written outside")
	left, err := filepath.Glob(filepath.Join(shared.runner.state.own(), heldPrefix+"*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// A runner that cannot hold what it checked takes nothing that a container could swap.
func TestVolumesWithoutHolding(t *testing.T) {
	t.Parallel()
	needEngine(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "in.txt"), []byte("hello"), 0o644)) //nolint:gosec // a container reads it
	r := newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
	e, err := r.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	for _, changed := range []engine{{info: e.info, shared: true}, {info: e.info}} {
		*e = changed
		config, policy := volumes("ro", dir, dir)
		require.Equal(t, object{"text": "hello"}, decoded(t, call{args: []string{"read", "/data/in.txt"}, config: config, policy: policy}.runOn(t, r)))
		config, policy = volumes("ro", dir, filepath.Dir(dir))
		_, message := failed(t, call{config: config, policy: policy}.runOn(t, r), "POLICY_VIOLATION")
		require.Contains(t, message, "could be another thing when the engine mounts it")
	}
}

func TestVolumesOfOneFileAndReadOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "in.txt")
	require.NoError(t, os.WriteFile(file, []byte("hello"), 0o644)) //nolint:gosec // a container reads it
	config, policy := volumes("ro", file, dir)
	require.Equal(t, object{"text": "hello"}, call{args: []string{"read", "/data"}, config: config, policy: policy}.output(t))
	_, message := call{args: []string{"write", "/data", "x"}, config: config, policy: policy}.fails(t, "REMOTE_ERROR")
	require.Contains(t, message, "read-only")
	config, policy = volumes("rw", file, dir)
	call{args: []string{"write", "/data", "changed"}, config: config, policy: policy}.output(t)
	text, err := os.ReadFile(file) //nolint:gosec // a test's own
	require.NoError(t, err)
	require.Equal(t, "changed", string(text))
}

// Without volume_restrictions a container sees nothing that is the mesh's, the engine's or a user's own.
func TestPrivateVolumes(t *testing.T) {
	t.Parallel()
	needEngine(t)
	data := filepath.Join(t.TempDir(), "data")
	require.NoError(t, os.MkdirAll(filepath.Join(data, "runs"), 0o750))
	state := filepath.Join(t.TempDir(), "state")
	r := newRunner(t, Options{StateDir: state, DeniedPaths: []string{data}})
	e, err := r.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	for _, host := range []string{data, filepath.Join(data, "runs"), filepath.Dir(data), state, "/home", "/root"} {
		config, _ := volumes("ro", host)
		failed(t, call{config: config}.runOn(t, r), "POLICY_VIOLATION")
		if host != "/root" && host != "/home" {
			config, policy := volumes("ro", host, "/")
			_, message := failed(t, call{config: config, policy: policy}.runOn(t, r), "POLICY_VIOLATION")
			require.Contains(t, message, "never be mounted", host)
		}
	}
	// The engine's own directory, wherever it is.
	elsewhere := t.TempDir()
	changed := *e
	changed.info.DockerRootDir = elsewhere
	r.engine.Store(&changed)
	config, _ := volumes("ro", elsewhere)
	_, message := failed(t, call{config: config}.runOn(t, r), "POLICY_VIOLATION")
	require.Contains(t, message, "belongs to the engine")

	// A user's directory is mounted where it is listed, and not by default.
	p := func(policy Policy) error {
		_, err := newPolicies(policy, nil, nil, &runner.Checks{}).volumes([]Volume{{HostPath: "/home/ada/models", ContainerPath: "/models"}}, byName)
		return err
	}
	require.ErrorContains(t, p(Policy{}), "must be listed")
	require.NoError(t, p(Policy{VolumeRestrictions: &VolumeRestrictions{AllowedHostPaths: []string{"/home/ada/models"}}}))
}

func TestEnvVarCeiling(t *testing.T) {
	t.Setenv("DATABASE_URL", "the-mesh's-own")
	auth := func(name string) object {
		return object{"image": "127.0.0.1:1/x:1", "registry_auth": object{"username_env_var": name, "password_env_var": name}}
	}
	images := []string{"127.0.0.1:1/*"}
	r := newRunner(t, Options{Ceiling: &Policy{AllowedImages: images, AllowedEnvVars: []string{"REGISTRY_*"}}})
	out, message := failed(t, call{config: auth("AWS_SECRET_ACCESS_KEY"), policy: object{"allowed_images": images}}.runOn(t, r), "POLICY_VIOLATION")
	require.Contains(t, message, `add "AWS_SECRET_ACCESS_KEY" to allowed_env_vars of the runner's --policy file`)
	checks := out.Finished.GetSecurity().GetChecks()
	require.Equal(t, "ceiling.allowed_env_vars", checks[len(checks)-1].GetRule())
	_, message = failed(t, call{config: auth("DATABASE_URL"), policy: object{"allowed_images": images}}.run(t), "POLICY_VIOLATION")
	require.Contains(t, message, "belongs to the mesh itself")
	_, message = failed(t, call{config: auth("REGISTRY_NOT_SET"), policy: object{"allowed_images": images}}.runOn(t, r), "VALIDATION")
	require.Contains(t, message, "REGISTRY_NOT_SET is not set")
	none := object{"allowed_images": images, "allowed_env_vars": []string{}}
	_, message = failed(t, call{config: auth("ANY"), policy: none}.run(t), "POLICY_VIOLATION")
	require.Contains(t, message, "the service's security_policy")
}

func TestDiskWritesAreMeasuredOrAbsent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config, policy := volumes("rw", dir, dir)
	out := call{args: []string{"write-mb", "/data/big", "20"}, config: config, policy: policy}.run(t)
	require.Empty(t, out.Code())
	if u := out.Finished.GetUsage(); u.DiskWriteMb != nil {
		require.Positive(t, u.GetDiskWriteMb())
	}
}

func TestHostileConfiguration(t *testing.T) {
	for name, config := range map[string]object{
		"privileged":    {"privileged": true},
		"cap_add":       {"cap_add": []string{"SYS_ADMIN"}},
		"pid":           {"pid_mode": "host"},
		"devices":       {"devices": []string{"/dev/kmsg"}},
		"security_opt":  {"security_opt": []string{"seccomp=unconfined"}},
		"over output":   {"tmpfs": []string{"/specql"}},
		"over proc":     {"tmpfs": []string{"/proc/x"}},
		"tmpfs options": {"tmpfs": []string{"/x:suid"}},
		"tmpfs size":    {"tmpfs": []string{"/x:size=99999999999999999999g"}},
		"environment":   {"environment": object{"A=B": "c"}},
		"own names":     {"environment": object{"SPECQL_JOB_ID": "x"}},
		"image":         {"image": "UPPER CASE"},
		"type":          {"command": "not a list"},
		"working dir":   {"working_dir": "../.."},
		"relative path": {"volumes": []object{{"host_path": "data", "container_path": "/data"}}},
	} {
		t.Run(name, func(t *testing.T) {
			out, message := call{config: config}.fails(t, "VALIDATION")
			require.NotEmpty(t, message)
			require.Nil(t, out.Finished.GetUsage().ExecutedVersion, "nothing ran")
		})
	}
}

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	limit := object{"resource_limits": object{"memory_mb": 48}}
	out, message := call{args: []string{"hog", "200"}, policy: limit}.fails(t, "RESOURCE_EXCEEDED")
	require.Contains(t, message, "its limit is 48 MiB, its peak was 4")
	u := out.Finished.GetUsage()
	require.True(t, u.GetOomKilled())
	require.EqualValues(t, 137, u.GetExitCode())
	require.InDelta(t, 48, u.GetPeakMemoryMb(), 4)

	fits := call{args: []string{"hog", "20"}, policy: limit}.run(t)
	require.Equal(t, object{"mb": 20.0}, decoded(t, fits))
	require.Greater(t, fits.Finished.GetUsage().GetPeakMemoryMb(), 20.0)
	require.Contains(t, fits.Finished.GetSecurity().GetIsolation(), "memory_limit")

	// A child is lost, and its parent says that all is well. Where the kernel cannot have the child's memory back at once, it ends
	// the parent, too: that is another case, told as such, and this one is tried again.
	child, message := call{args: []string{"hog-child", "200"}, policy: limit}.fails(t, "RESOURCE_EXCEEDED")
	for again := 0; child.Finished.GetUsage().GetExitCode() == 137 && again < 4; again++ {
		require.Contains(t, message, "ended the container for its memory: its limit is 48 MiB")
		require.True(t, child.Finished.GetUsage().GetOomKilled())
		child, message = call{args: []string{"hog-child", "200"}, policy: limit}.fails(t, "RESOURCE_EXCEEDED")
	}
	require.Contains(t, message, "ended a process of the container for its memory: its limit is 48 MiB")
	require.True(t, child.Finished.GetUsage().GetOomKilled())
	require.EqualValues(t, 0, child.Finished.GetUsage().GetExitCode())
}

func TestProcessLimit(t *testing.T) {
	t.Parallel()
	out := call{args: []string{"fork", "200"}, policy: object{"resource_limits": object{"processes": 40}}}.output(t)
	require.Contains(t, out["error"], "resource temporarily unavailable")
	require.Less(t, out["started"], 40.0)
}

func TestDiskLimit(t *testing.T) {
	t.Parallel()
	limit := object{"resource_limits": object{"disk_mb": 8}}
	for _, at := range []string{"/tmp/full", "/specql/full", "/cache/full"} {
		out := call{args: []string{"fill", at}, config: object{"tmpfs": []string{"/cache"}}, policy: limit}.output(t)
		require.NotEqual(t, "<nil>", out["error"])
		require.LessOrEqual(t, out["bytes"], float64(8<<20), at)
	}
	_, message := call{config: object{"tmpfs": []string{"/cache:size=1g"}}, policy: limit}.fails(t, "VALIDATION")
	require.Contains(t, message, "disk_mb")
	// A driver that cannot bound the root is said, and single files are bounded all the same.
	out := call{args: []string{"fill", "/full"}, config: object{"read_only": false}, policy: limit}.run(t)
	require.LessOrEqual(t, decoded(t, out)["bytes"], float64(8<<20))
	if shared.runner.storageMissing.Load() {
		require.Contains(t, out.Lines("runner")[0], "cannot bound the root file system")
		require.NotContains(t, out.Finished.GetSecurity().GetIsolation(), "disk_limit")
	}
}

func TestUsageIsMeasured(t *testing.T) {
	out := call{args: []string{"burn", "400ms"}, policy: object{"resource_limits": object{"cpu_cores": 64}}}.run(t)
	u := out.Finished.GetUsage()
	require.Equal(t, "cgroup", u.GetSource())
	require.InDelta(t, 0.45, u.GetCpuSeconds(), 0.15, "the program used 0.4 s, its start the rest")
	require.Positive(t, u.GetCpuUsagePercent())
	require.Greater(t, u.GetPeakMemoryMb(), 0.5)
	if u.MemoryMb != nil { // a short program may end between two readings
		require.Greater(t, u.GetMemoryMb(), 0.5, "the memory of the running program, not of what is left of it")
		require.LessOrEqual(t, u.GetMemoryMb(), u.GetPeakMemoryMb())
	}
	require.Greater(t, u.GetDurationSeconds(), 0.4)
	require.EqualValues(t, 0, u.GetExitCode())
	require.NotNil(t, u.OomKilled)
	require.Nil(t, u.NetworkRxMb, "without a network nothing is measured")
	require.Regexp(t, `^sha256:[0-9a-f]{64}$`, u.GetExecutedVersion())
	long := call{args: []string{"burn", "1500ms"}, config: object{"network_mode": "bridge"}, policy: object{"allowed_networks": []string{"bridge"}}}.run(t)
	require.NotEmpty(t, long.Usages, "a long job is measured while it runs")
	require.Greater(t, long.Finished.GetUsage().GetMemoryMb(), 0.5)
	require.NotNil(t, long.Finished.GetUsage().NetworkRxMb)
}

func TestPolicyTimeout(t *testing.T) {
	begin := time.Now()
	_, message := call{args: []string{"sleep", "1h"}, policy: object{"resource_limits": object{"timeout_seconds": 0.5}}}.fails(t, "TIMEOUT")
	require.Contains(t, message, "resource_limits.timeout_seconds of 500ms")
	require.Less(t, time.Since(begin), 5*time.Second)
}

func TestJobTimeoutIsInLabels(t *testing.T) {
	needEngine(t)
	job := call{args: []string{"ignore-signals"}}.job(t)
	job.Timeout = durationpb.New(time.Hour)
	running := runnertest.Begin(t, runnertest.Start(t, shared.runner), job)
	running.Line("sleeping")
	ids := containersOf(t, job.GetId())
	require.Len(t, ids, 1)
	found, err := shared.runner.client.ContainerInspect(t.Context(), ids[0], client.ContainerInspectOptions{})
	require.NoError(t, err)
	labels := found.Container.Config.Labels
	require.Equal(t, shared.runner.owner.instance, labels[labelRunner])
	require.Regexp(t, `^\d{10}$`, labels[labelExpires])
	host := found.Container.HostConfig
	require.False(t, host.Privileged)
	require.Empty(t, host.CapAdd)
	require.Equal(t, "private", string(host.IpcMode))
	require.Empty(t, string(host.PidMode))
	require.False(t, host.AutoRemove)
	running.Cancel("seen")
	require.Equal(t, "CANCELLED", running.Wait().Code())
	requireGone(t, job.GetId())
}

func TestCeiling(t *testing.T) {
	needEngine(t)
	r := newRunner(t, Options{Ceiling: &Policy{
		AllowedImages:  []string{"specql-test/*"},
		ResourceLimits: &ResourceLimits{MemoryMB: 32, TimeoutSeconds: 20},
	}})
	_, message := failed(t, call{args: []string{"hog", "100"}, policy: object{"resource_limits": object{"memory_mb": 512}}}.runOn(t, r), "RESOURCE_EXCEEDED")
	require.Contains(t, message, "its limit is 32 MiB", "the smaller limit counts")
	out, message := failed(t, call{config: object{"image": "other/image"}, policy: object{"allowed_images": []string{"*"}}}.runOn(t, r), "POLICY_VIOLATION")
	require.Contains(t, message, "the runner's --policy file")
	require.Equal(t, "ceiling.allowed_images", out.Finished.GetSecurity().GetChecks()[0].GetRule())
	failed(t, call{config: object{"network_mode": "bridge"}, policy: object{"allowed_networks": []string{"bridge"}}}.runOn(t, r), "POLICY_VIOLATION")
	_, err := New(Options{Ceiling: &Policy{AllowedImages: []string{"*bad*"}}})
	require.ErrorContains(t, err, "allowed_images[0]")
}

func TestManyAtOnce(t *testing.T) {
	needEngine(t)
	server := runnertest.Start(t, shared.runner)
	var calls []*runnertest.Call
	for range 6 {
		calls = append(calls, runnertest.Begin(t, server, call{args: []string{"echo-input"}}.job(t)))
	}
	for _, c := range calls {
		require.Empty(t, c.Wait().Code())
	}
}

func TestStreamKeepsTheBeginningOfALongLine(t *testing.T) {
	var got []string
	s := &stream{name: "stdout", sink: sinkFunc(func(_, line string) { got = append(got, line) }), keep: func([]byte) {}}
	for _, part := range []string{"a", "b\r\n", "\n", strings.Repeat("x", maxLine), "yyy", "\nlast"} {
		n, err := s.Write([]byte(part))
		require.NoError(t, err)
		require.Equal(t, len(part), n)
	}
	s.flush()
	require.Equal(t, []string{"ab", "", strings.Repeat("x", maxLine), "last"}, got)
	var end tail
	end.add(bytes.Repeat([]byte("a"), 3*maxErrorTail))
	end.add([]byte("end"))
	require.Len(t, end.last(maxErrorTail), maxErrorTail)
	require.True(t, strings.HasSuffix(end.last(10), "aend"))
}

func TestCPULimit(t *testing.T) {
	out := call{args: []string{"burn", "400ms"}, policy: object{"resource_limits": object{"cpu_cores": 0.25}}}.run(t)
	decoded(t, out)
	require.Less(t, out.Finished.GetUsage().GetCpuUsagePercent(), 35.0)
	require.Greater(t, out.Finished.GetUsage().GetDurationSeconds(), 1.2)
	require.Contains(t, out.Finished.GetSecurity().GetIsolation(), "cpu_limit")
}

func TestTraceContextIsPassedOn(t *testing.T) {
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	p := &Prepared{job: &runner.Job{}}
	require.Contains(t, p.Environment(trace.ContextWithSpanContext(t.Context(), span)), "TRACEPARENT=00-01000000000000000000000000000000-0200000000000000-01")
}

func BenchmarkJob(b *testing.B) {
	if shared.away != "" {
		b.Skipf("no Docker engine answers, so no container can run: %s", shared.away)
	}
	config, err := json.Marshal(object{"image": shared.image, "command": []string{"args", "x"}})
	require.NoError(b, err)
	job := &runner.Job{
		ID: "job-bench", Input: json.RawMessage("{}"),
		Service: runner.Service{Config: config, Policy: json.RawMessage(`{"allowed_images":["specql-test/*"],"resource_limits":{"memory_mb":64}}`)},
	}
	for b.Loop() {
		res, err := shared.runner.Execute(b.Context(), job, sinkFunc(func(string, string) {}))
		require.NoError(b, err)
		require.NoError(b, res.Err)
	}
}

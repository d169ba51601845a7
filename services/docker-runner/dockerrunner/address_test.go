package dockerrunner

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func TestRouteToTheEngine(t *testing.T) {
	for _, c := range []struct {
		host, certs, verify string
		refused, exposed    string
	}{
		{host: "unix:///run/x.sock"},
		{host: "tcp://192.0.2.1:2375", refused: "without TLS"},
		{host: "http://192.0.2.1:2375", refused: "without TLS"},
		{host: "https://192.0.2.1:2376", refused: "without TLS"},
		{host: "tcp://docker:2375", refused: "without TLS"},
		{host: "tcp://localhost.example.com:2375", refused: "without TLS"},
		{host: "tcp://127.0.0.1:2375", exposed: "every user of this host"},
		{host: "tcp://[::1]:2375", exposed: "every user of this host"},
		{host: "tcp://localhost:2375", exposed: "every user of this host"},
		{host: "tcp://192.0.2.1:2376", certs: "/certs", refused: "DOCKER_TLS_VERIFY=1"},
		{host: "tcp://192.0.2.1:2376", certs: "/certs", verify: "1"},
		{host: "tcp://192.0.2.1:2376", verify: "1", refused: "without TLS"},
	} {
		t.Setenv(client.EnvOverrideCertPath, c.certs)
		t.Setenv(client.EnvTLSVerify, c.verify)
		r := routeTo(c.host)
		for _, text := range [][2]string{{c.refused, r.refused}, {c.exposed, r.exposed}} {
			require.Contains(t, text[1], text[0], c.host)
			require.Equal(t, text[0] == "", text[1] == "", "%s: %s", c.host, text[1])
		}
	}
}

// An engine that anybody on the way can be is given no job, and no credentials.
func TestEngineWithoutTLSIsRefused(t *testing.T) {
	r := newRunner(t, Options{Host: "tcp://192.0.2.1:2375"})
	f, ok := fault.As(r.Ping(t.Context()))
	require.True(t, ok)
	require.Equal(t, fault.Unavailable, f.Code)
	job := call{config: object{"image": "specql-test/x"}}.job(t)
	_, message := failed(t, runnertest.Execute(t, runnertest.Start(t, r), job), "UNAVAILABLE")
	require.Contains(t, message, "without TLS")
	d, err := r.Describe(t.Context())
	require.NoError(t, err)
	require.Contains(t, d.Isolation[0].Detail, "without TLS")
	_, err = New(Options{Host: "tcp://192.0.2.1:2375", RequireIsolation: []string{"seccomp"}})
	require.ErrorContains(t, err, "without TLS")
}

func TestWhoReachesTheSocket(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "engine")
	require.NoError(t, os.Mkdir(dir, 0o700))
	name := filepath.Join(dir, "docker.sock")
	require.Contains(t, route{socket: name}.who(), "cannot be looked at")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", name)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	require.NoError(t, os.Chmod(name, 0o600))
	require.Empty(t, route{socket: name}.who())
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(name, link))
	require.Empty(t, route{socket: link}.who(), "what it leads to counts")
	require.NoError(t, os.Chmod(name, 0o666)) //nolint:gosec // that is what is tested
	require.Contains(t, route{socket: link}.who(), "every user of this host may use "+name)
	require.NoError(t, os.Chmod(name, 0o660)) //nolint:gosec // that is what is tested
	if os.Getuid() == 0 {
		require.NoError(t, os.Chown(name, 0, 4_000_000))
		require.Contains(t, route{socket: name}.who(), "group 4000000, whose members are not known")
		require.NoError(t, os.Chown(name, 65534, 0))
		require.Contains(t, route{socket: name}.who(), "belongs to user 65534")
		require.NoError(t, os.Chown(name, 0, 0))
	}
	require.NoError(t, os.Chmod(name, 0o600))
	require.NoError(t, os.Chmod(dir, 0o777)) //nolint:gosec // that is what is tested
	require.Contains(t, route{socket: name}.who(), "others may write "+dir)
	require.NoError(t, os.Chmod(dir, 0o700|os.ModeSticky)) //nolint:gosec // that is what is tested
	require.Empty(t, route{socket: name}.who())
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	require.Contains(t, route{socket: filepath.Join(dir, "file")}.who(), "is no socket")
}

func TestRequireIsolation(t *testing.T) {
	needEngine(t)
	_, err := New(Options{RequireIsolation: []string{"no_such_thing"}})
	require.ErrorContains(t, err, "is not known")
	_, err = New(Options{Host: "unix:///no/such/docker.sock", RequireIsolation: []string{"seccomp"}})
	require.ErrorContains(t, err, "no Docker engine answers")

	state := filepath.Join(t.TempDir(), "state")
	r := newRunner(t, Options{StateDir: state, RequireIsolation: []string{"seccomp", "processes_limit", "capabilities_dropped"}})
	require.Equal(t, "probe", decoded(t, call{}.runOn(t, r))["program"])
	// The engine is started again without its profile: no job runs there.
	changed := *r.engine.Load()
	changed.info.SecurityOptions = []string{"name=seccomp,profile=unconfined"}
	r.engine.Store(&changed)
	out, message := failed(t, call{}.runOn(t, r), "UNAVAILABLE")
	require.Contains(t, message, "lacks seccomp")
	require.Nil(t, out.Finished.GetUsage().ExitCode)
	r.refresh(t.Context())
	require.Equal(t, "probe", decoded(t, call{}.runOn(t, r))["program"])

	// One that insists on nothing runs it, and says what holds it.
	loose := newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
	_, err = loose.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	loose.engine.Store(&changed)
	ran := call{}.runOn(t, loose)
	decoded(t, ran)
	require.NotContains(t, ran.Finished.GetSecurity().GetIsolation(), "seccomp")

	images, err := r.client.ImageList(t.Context(), client.ImageListOptions{})
	require.NoError(t, err)
	for _, image := range images.Items {
		for _, tag := range image.RepoTags {
			require.NotContains(t, tag, "specql-probe:")
		}
	}
}

// A limit that the engine would drop is no limit.
func TestLimitsThatTheEngineCannotHold(t *testing.T) {
	needEngine(t)
	r := newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
	e, err := r.inspectEngine(t.Context(), shared.image)
	require.NoError(t, err)
	changed := *e
	changed.info.MemoryLimit = false
	r.engine.Store(&changed)
	out, message := failed(t, call{policy: object{"resource_limits": object{"memory_mb": 64}}}.runOn(t, r), "POLICY_VIOLATION")
	require.Contains(t, message, "resource_limits.memory_mb forbids 64")
	require.Nil(t, out.Finished.GetUsage().ExitCode)
	decoded(t, call{}.runOn(t, r))
}

func TestForgedLabels(t *testing.T) {
	needEngine(t)
	image := hostileImage(t, []string{`LABEL dev.specql.expires=1 dev.specql.runner=other dev.specql.host=x dev.specql.process=1/1`})
	job := call{args: []string{"ignore-signals"}, config: object{"image": image}}.job(t)
	running := runnertest.Begin(t, runnertest.Start(t, shared.runner), job)
	running.Line("sleeping")
	other := newRunner(t, Options{StateDir: filepath.Join(t.TempDir(), "state")})
	_, err := other.Sweep(t.Context())
	require.NoError(t, err)
	require.Len(t, containersOf(t, job.GetId()), 1, "another runner does not take it for a leftover")
	running.Cancel("seen")
	require.Equal(t, "CANCELLED", running.Wait().Code())
	requireGone(t, job.GetId())
}

// A leftover is known by its name as well: labels may come from an image that somebody runs.
func TestContainersOfOthersAreLeftAlone(t *testing.T) {
	needEngine(t)
	image := hostileImage(t, []string{`LABEL dev.specql.expires=1 dev.specql.runner=other dev.specql.job=` + randomName()})
	created, err := shared.runner.client.ContainerCreate(t.Context(), client.ContainerCreateOptions{Image: image})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, shared.runner.removeContainer(cleanup(t), created.ID)) })
	_, err = shared.runner.Sweep(t.Context())
	require.NoError(t, err)
	_, err = shared.runner.client.ContainerInspect(t.Context(), created.ID, client.ContainerInspectOptions{})
	require.NoError(t, err)
}

// A compromised orchestrator sends what it likes, and gets nothing beyond the ceiling.
func TestCeilingHoldsAgainstTheOrchestrator(t *testing.T) {
	needEngine(t)
	dir := t.TempDir()
	r := newRunner(t, Options{Ceiling: &Policy{
		AllowedImages:      []string{"specql-test/probe:*"},
		VolumeRestrictions: &VolumeRestrictions{AllowedHostPaths: []string{filepath.Join(dir, "allowed")}, MaxVolumes: new(1)},
		AllowedEnvVars:     []string{"REGISTRY_*"},
		ResourceLimits:     &ResourceLimits{MemoryMB: 64, Processes: 64, TimeoutSeconds: 20, CPUCores: 1, DiskMB: 8},
	}})
	everything := object{
		"allowed_images": []string{"*"}, "allowed_networks": []string{"bridge"}, "volume_restrictions": object{"allowed_host_paths": []string{"/"}},
		"allowed_env_vars": []string{"*"}, "resource_limits": object{"memory_mb": 1 << 20, "processes": 1 << 20, "timeout_seconds": 1e9, "disk_mb": 1 << 20},
	}
	volume := func(host string) []object { return []object{{"host_path": host, "container_path": "/data"}} }
	require.NoError(t, os.Mkdir(filepath.Join(dir, "allowed"), 0o755)) //nolint:gosec // a container looks at it
	for rule, c := range map[string]object{
		"ceiling.allowed_images":                         {"image": "specql-test/other:1"},
		"ceiling.allowed_networks":                       {"network_mode": "bridge"},
		"ceiling.volume_restrictions.allowed_host_paths": {"volumes": volume(dir)},
		"ceiling.volume_restrictions.max_volumes":        {"volumes": append(volume(filepath.Join(dir, "allowed")), object{"host_path": filepath.Join(dir, "allowed"), "container_path": "/more"})},
		"ceiling.allowed_env_vars":                       {"registry_auth": object{"username_env_var": "HOME", "password_env_var": "PATH"}},
	} {
		out, message := failed(t, call{config: c, policy: everything}.runOn(t, r), "POLICY_VIOLATION")
		checks := out.Finished.GetSecurity().GetChecks()
		require.Equal(t, rule, checks[len(checks)-1].GetRule(), message)
		require.Len(t, out.Finished.GetSecurity().GetPolicyDigest(), 64)
	}
	failed(t, call{args: []string{"hog", "200"}, policy: everything}.runOn(t, r), "RESOURCE_EXCEEDED")
	out := call{args: []string{"fork", "200"}, policy: everything}.runOn(t, r)
	require.Less(t, decoded(t, out)["started"], 64.0)
	filled := decoded(t, call{args: []string{"fill", "/dev/shm/full"}, policy: everything}.runOn(t, r))
	require.LessOrEqual(t, filled["bytes"], float64(8<<20))
}

package dockerrunner

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

// hostile is an attempt of a workflow, an image or a program in a container on what it is not to have.
type hostile struct {
	// name says what it tries.
	name string
	call call
	// want are the answers that every try in the container must get, one of them each.
	want string
	// code is how the job must fail, one of them; empty for one that completes, with all tries answered.
	code string
	text string
	// blocked: nothing may have run.
	blocked bool
	// cancel is the line after which the job is cancelled.
	cancel string
	// check looks at what came out.
	check func(t *testing.T, out *runnertest.Outcome)
}

// not are the answers where what is tried is not even there, or may not be had.
const not = "ENOENT EACCES EPERM EROFS"

func (h hostile) policy(key string, value any) hostile {
	if h.call.policy == nil {
		h.call.policy = object{}
	}
	h.call.policy[key] = value
	return h
}

func (h hostile) limits(name string, value any) hostile {
	limits, _ := h.call.policy["resource_limits"].(object)
	if limits == nil {
		limits = object{}
	}
	limits[name] = value
	return h.policy("resource_limits", limits)
}

func (h hostile) config(key string, value any) hostile {
	if h.call.config == nil {
		h.call.config = object{}
	}
	h.call.config[key] = value
	return h
}

func (h hostile) until(line string) hostile {
	h.cancel = line
	return h
}

// inside is an attack of a program that has been let in.
func inside(attack, want string, args ...string) hostile {
	return hostile{name: attack, call: call{args: append([]string{"attack", attack}, args...)}, want: want}
}

// ends is an attack that must end its job with a code.
func ends(attack, code, text string, args ...string) hostile {
	return hostile{name: attack, call: call{args: append([]string{"endless", attack}, args...)}, code: code, text: text}
}

// probes runs a verb of the tests' program.
func probes(name, code, text string, args ...string) hostile {
	return hostile{name: name, call: call{args: args}, code: code, text: text}
}

// asks is a configuration or a policy that asks for too much: nothing of it may run.
func asks(name, code, text string) hostile {
	return hostile{name: name, call: call{args: []string{"args"}}, code: code, text: text, blocked: true}
}

// mounting asks for a volume that every policy allows.
func mounting(name, host, text string) hostile {
	return asks("mount "+name, "POLICY_VIOLATION", text).
		config("volumes", []object{{"host_path": host, "container_path": "/data"}}).
		policy("volume_restrictions", object{"allowed_host_paths": []string{"/"}})
}

// arena is what an attacker finds around it.
type arena struct {
	r                       *Runner
	secret, socket, engine  string
	abstract, port, segment string
	key                     int
	images                  map[string]string
	alias, jail             string
}

// hostSecret is in the environment of the runner.
const hostSecret = "SPECQL_HOSTILE_SECRET"

// entry is a file of a hostile image.
type entry struct {
	name string
	kind byte
	link string
	mode int64
	data []byte
	// device is its number.
	device [2]int64
}

// hostileImage makes an image with the tests' program, and what its author adds.
func hostileImage(t *testing.T, changes []string, entries ...entry) string {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, e := range append([]entry{{name: "probe", kind: tar.TypeReg, mode: 0o755, data: shared.binary}}, entries...) {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: e.mode, Size: int64(len(e.data)), Devmajor: e.device[0], Devminor: e.device[1]}))
		_, err := w.Write(e.data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	tag := "specql-test/hostile:" + randomName()
	response, err := shared.runner.client.ImageImport(t.Context(), client.ImageImportSource{Source: &archive, SourceName: "-"}, tag, client.ImageImportOptions{Changes: append([]string{`ENTRYPOINT ["/probe"]`}, changes...)})
	require.NoError(t, err)
	defer func() { require.NoError(t, response.Close()) }()
	answer := new(bytes.Buffer)
	_, err = answer.ReadFrom(response)
	require.NoError(t, err)
	require.NotContains(t, answer.String(), `"error"`)
	t.Cleanup(func() { require.NoError(t, imagebuild.Remove(cleanup(t), "", tag)) })
	return tag
}

func newArena(t *testing.T) *arena {
	t.Helper()
	needEngine(t)
	t.Setenv(hostSecret, "the-runner's-own")
	a := &arena{r: newRunner(t, Options{}), images: map[string]string{}}
	top := t.TempDir()
	a.secret = filepath.Join(top, "secret")
	require.NoError(t, os.Chmod(top, 0o755))                                   //nolint:gosec // everybody may read it, if it is found
	require.NoError(t, os.WriteFile(a.secret, []byte("the machine's"), 0o644)) //nolint:gosec // the same
	listen := func(network, address string) net.Addr {
		l, err := new(net.ListenConfig).Listen(t.Context(), network, address)
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Close() })
		return l.Addr()
	}
	a.port = listen("tcp", "127.0.0.1:0").String()
	a.abstract = fmt.Sprintf("@specql-hostile-%d", os.Getpid())
	listen("unix", a.abstract)
	a.socket = filepath.Join(top, "socket")
	listen("unix", a.socket)
	require.NoError(t, os.Chmod(a.socket, 0o777)) //nolint:gosec // that is what is tested
	a.engine = strings.TrimPrefix(a.r.client.DaemonHost(), "unix://")
	a.key = 0xd0c0 + os.Getpid()
	id, err := unix.SysvShmGet(a.key, 4096, unix.IPC_CREAT|0o666)
	require.NoError(t, err)
	t.Cleanup(func() { _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); require.NoError(t, err) })
	a.segment = fmt.Sprintf("specql-hostile-%d", os.Getpid())
	require.NoError(t, os.WriteFile("/dev/shm/"+a.segment, []byte("x"), 0o666)) //nolint:gosec // that is what is tested
	t.Cleanup(func() { require.NoError(t, os.Remove("/dev/shm/"+a.segment)) })

	// Other names of what must not be mounted, as administrators make them.
	a.alias, a.jail = filepath.Join(top, "alias"), filepath.Join(top, "jail")
	for dir, how := range map[string][2]string{a.alias: {"/etc", ""}, filepath.Join(a.jail, "proc"): {"proc", "proc"}} {
		require.NoError(t, os.MkdirAll(dir, 0o755)) //nolint:gosec // a container would look at it
		flags := uintptr(unix.MS_BIND)
		if how[1] != "" {
			flags = 0
		}
		require.NoError(t, unix.Mount(how[0], dir, how[1], flags, ""), "run as root: the test mounts")
		t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	}

	dir := func(name string) entry { return entry{name: name + "/", kind: tar.TypeDir, mode: 0o755} }
	link := func(name, to string) entry { return entry{name: name, kind: tar.TypeSymlink, link: to, mode: 0o777} }
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("VOLUME /v%d", i)
	}
	for name, image := range map[string]struct {
		changes []string
		entries []entry
	}{
		"works in a descriptor": {changes: []string{"WORKDIR /proc/self/fd/8"}},
		"works behind a link":   {changes: []string{"WORKDIR /work"}, entries: []entry{link("work", "/proc/self/fd/8")}},
		"volume in /dev":        {changes: []string{"VOLUME /dev/unbounded"}},
		"volume behind a link":  {changes: []string{"VOLUME /link/x"}, entries: []entry{dir("real"), link("link", "/real")}},
		"volume over its root":  {changes: []string{"VOLUME /"}},
		"volume in the output":  {changes: []string{"VOLUME /specql/x"}},
		"bounded volume":        {changes: []string{"VOLUME /cache"}},
		"many volumes":          {changes: many},
		"forged labels":         {changes: []string{`LABEL dev.specql.expires=1 dev.specql.runner=other dev.specql.host=x dev.specql.process=1/1 dev.specql.job=other`}},
		"forged variables":      {changes: []string{`ENV SPECQL_JOB_ID=forged SPECQL_INPUT=forged SPECQL_IDEMPOTENCY_KEY=forged LD_PRELOAD=/probe`}},
		"output is a link":      {entries: []entry{link("specql", "/proc/sys")}},
		"output is a way out":   {entries: []entry{link("specql", "../../../../../../../srv/out")}},
		"output is a file":      {entries: []entry{{name: "specql", kind: tar.TypeReg, mode: 0o644}}},
		"runs as its owner":     {entries: []entry{{name: "root", kind: tar.TypeReg, mode: 0o6755, data: shared.binary}}},
		"devices":               {entries: []entry{{name: "mem", kind: tar.TypeChar, mode: 0o666, device: [2]int64{1, 1}}}},
		"a shell":               {changes: []string{`ENTRYPOINT ["/bin/sh","-c"]`}},
		"accounts in a pipe":    {entries: []entry{dir("etc"), {name: "etc/passwd", kind: tar.TypeFifo, mode: 0o644}}},
		"groups behind a link":  {entries: []entry{dir("etc"), {name: "pipe", kind: tar.TypeFifo, mode: 0o644}, link("etc/group", "../../pipe")}},
		"accounts in a loop":    {entries: []entry{dir("etc"), link("etc/passwd", "group"), link("etc/group", "passwd")}},
		"no such user":          {changes: []string{"USER ../../../root:docker"}},
	} {
		a.images[name] = hostileImage(t, image.changes, image.entries...)
	}
	return a
}

func (a *arena) suite() []hostile {
	pid := strconv.Itoa(os.Getpid())
	image := func(name string) string { return a.images[name] }
	status := func(t *testing.T, out *runnertest.Outcome) {
		t.Helper()
		s := decoded(t, out)
		require.Equal(t, "1000\t1000\t1000\t1000", s["Uid"])
		require.Equal(t, "1", s["NoNewPrivs"])
	}
	const file = "/specql/output.json"
	suite := []hostile{
		// A program that has been let in.
		inside("mounts", "EPERM EINVAL EACCES ENOSYS"),
		inside("mounts", "EPERM EINVAL EACCES ENOSYS").config("user", "1000"),
		inside("name spaces", "EPERM ENOSYS EINVAL EACCES"),
		inside("capabilities", "EPERM EINVAL EACCES"),
		inside("devices", not+" ENXIO"),
		inside("settings of the kernel", not),
		inside("memory of the kernel", not+" EMPTY"),
		inside("system calls", "EPERM ENOSYS EACCES"),
		inside("processes of the host", "ESRCH ENOENT EACCES EPERM", pid, a.secret, "the-runner's-own"),
		inside("files of the host", not, a.secret, a.engine, a.socket, "/var/lib/docker", a.r.state.own(), "/etc/shadow", "/root/.ssh"),
		inside("write the root", not+" ETXTBSY"),
		inside("the network", "ENETUNREACH ECONNREFUSED EADDRNOTAVAIL", a.port),
		inside("the network", "ECONNREFUSED EADDRNOTAVAIL ENETUNREACH ETIMEDOUT EHOSTUNREACH TIMEOUT", a.port).config("network_mode", "bridge").policy("allowed_networks", []string{"bridge"}),
		inside("raw sockets", "EPERM EAFNOSUPPORT").config("network_mode", "bridge").policy("allowed_networks", []string{"bridge"}),
		inside("sockets of the host", "ECONNREFUSED ENOENT", a.abstract, a.socket, a.engine, "/run/containerd/containerd.sock"),
		inside("shared memory of the host", "ENOENT", strconv.Itoa(a.key), a.segment),
		inside("programs in memory", "EACCES"),
		inside("limits", "EPERM EACCES").limits("disk_mb", 8),
		inside("many files", "ENOSPC EDQUOT", "/specql"),
		inside("one file", "EFBIG ENOSPC", "/specql/one").limits("disk_mb", 8),
		inside("fill", "ENOSPC EFBIG EROFS", "/tmp", "/specql", "/dev/shm", "/cache", "/").limits("disk_mb", 8).config("tmpfs", []string{"/cache"}),
		inside("fill", "ENOSPC", "/tmp", "/specql", "/dev/shm", "/dev", "/cache").config("image", image("bounded volume")),

		// A program that does not end, or takes too much.
		ends("fork bomb", "TIMEOUT RESOURCE_EXCEEDED", "").limits("timeout_seconds", 10).limits("processes", 32),
		ends("fork bomb that ends", "RESOURCE_EXCEEDED", "limit of 32").limits("processes", 32),
		probes("memory", "RESOURCE_EXCEEDED", "its limit is 48 MiB, its peak was 4", "hog", "300").limits("memory_mb", 48),
		ends("memory of many", "RESOURCE_EXCEEDED", "its limit is 64 MiB").limits("memory_mb", 64).limits("timeout_seconds", 30),
		ends("memory as files", "RESOURCE_EXCEEDED", "its limit is 24 MiB", "/dev/shm").limits("memory_mb", 24),
		ends("deaf", "CANCELLED", "").until("sleeping"),
		ends("stop", "CANCELLED", "").until("sleeping"),
		probes("children that are deaf", "CANCELLED", "", "ignore-signals").until("sleeping"),
		probes("children that are deaf, for long", "TIMEOUT", "timeout_seconds", "ignore-signals").limits("timeout_seconds", 10),
		ends("kill itself", "REMOTE_ERROR", "status 137"),
		probes("a status as if for memory", "REMOTE_ERROR", "status 137", "exit", "137").limits("memory_mb", 64),
		probes("endless output", "RESOURCE_EXCEEDED", "4 MiB", "flood"),
		ends("a line without end", "RESOURCE_EXCEEDED", "4 MiB"),
		{
			name: "endless errors", call: call{args: []string{"endless", "stderr"}}, code: "REMOTE_ERROR", text: "status 9",
			check: func(t *testing.T, out *runnertest.Outcome) {
				t.Helper()
				require.Less(t, len(out.Finished.GetError().GetMessage()), 2*errorTail)
			},
		},
		ends("control characters", "", ""),

		// What a program leaves as its output.
		ends("deep", "", ""),
		probes("output is a link to the host", "VALIDATION", "not a regular file", "symlink", a.secret, file),
		probes("output is a link to a descriptor", "VALIDATION", "not a regular file", "symlink", "/proc/self/environ", file),
		probes("output is a pipe", "VALIDATION", "not a regular file", "fifo", file),
		probes("output is a directory", "VALIDATION", "not a regular file", "mkdir", file),
		ends("socket", "VALIDATION", "not a regular file", file),
		ends("hard link", "REMOTE_ERROR", "cross-device", file),
		probes("output is huge", "RESOURCE_EXCEEDED", "4 MiB", "write-sparse", file),
		probes("output is deep", "VALIDATION", "nested deeper", "write-deep", file),
		probes("output is no text", "VALIDATION", "UTF-8", "write-latin1", file),

		// An image.
		asks("an image that works in a descriptor of the runtime", "VALIDATION", "works in").config("image", image("works in a descriptor")),
		probes("an image that works there behind a link", "VALIDATION", "", "args").config("image", image("works behind a link")),
		asks("an image with a volume in /dev", "VALIDATION", "declares a volume").config("image", image("volume in /dev")),
		asks("an image with a volume over its root", "VALIDATION", "declares a volume").config("image", image("volume over its root")),
		asks("an image with a volume in the output", "VALIDATION", "declares a volume").config("image", image("volume in the output")),
		asks("an image with many volumes", "VALIDATION", "100 volumes").config("image", image("many volumes")),
		inside("fill", "ENOSPC", "/link/x").config("image", image("volume behind a link")),
		probes("an image whose output is a link to the kernel's files", "VALIDATION", "cannot start", "write", file, `{"a":1}`).config("image", image("output is a link")),
		probes("an image whose output is a link to the host's files", "", "", "write", file, `{"a":1}`).config("image", image("output is a way out")),
		probes("an image whose output is a file", "VALIDATION", "can", "write", file, `{"a":1}`).config("image", image("output is a file")),
		{name: "an image with a program that runs as its owner", call: call{args: []string{"status"}, config: object{"image": image("runs as its owner"), "entrypoint": []string{"/root"}, "user": "1000"}}, check: status},
		probes("an image with a device", "REMOTE_ERROR", "not permitted", "read", "/mem").config("image", image("devices")),
		asks("an image whose accounts are a pipe", "VALIDATION", "/etc/passwd").config("image", image("accounts in a pipe")),
		asks("an image whose groups are a pipe behind a link", "VALIDATION", "/etc/group").config("image", image("groups behind a link")),
		asks("an image whose accounts are a loop", "VALIDATION", "/etc/passwd").config("image", image("accounts in a loop")),
		{name: "an image whose entrypoint runs the input", call: call{args: []string{"$input.x"}, input: object{"x": "reboot"}, config: object{"image": image("a shell")}}, code: "VALIDATION", text: "run as code", blocked: true},
		probes("an image with a user of the host", "VALIDATION", "user", "status").config("image", image("no such user")),
		{
			name: "an image that forges the job's variables", call: call{args: []string{"env"}, id: "job-true", config: object{"image": image("forged variables")}},
			check: func(t *testing.T, out *runnertest.Outcome) {
				t.Helper()
				env := decoded(t, out)
				require.Equal(t, "job-true", env["SPECQL_JOB_ID"])
				require.Equal(t, "{}", env["SPECQL_INPUT"])
				require.Equal(t, "key-1", env["SPECQL_IDEMPOTENCY_KEY"])
			},
		},
		asks("an image with the pinned one's name", "POLICY_VIOLATION", "another digest").policy("allowed_images", []string{strings.Split(shared.image, ":")[0] + "@sha256:" + strings.Repeat("0", 64)}),

		// The author of the registry.
		asks("the host's network", "POLICY_VIOLATION", "never shared").config("network_mode", "host").policy("allowed_networks", []string{"host"}),
		asks("the network of a container", "POLICY_VIOLATION", "never shared").config("network_mode", "container:x").policy("allowed_networks", []string{"container:x"}),
		asks("a network by its file", "POLICY_VIOLATION", "never shared").config("network_mode", "ns:/proc/1/ns/net").policy("allowed_networks", []string{"ns:/proc/1/ns/net"}),
		asks("a network that is not listed", "POLICY_VIOLATION", "allowed_networks").config("network_mode", "bridge"),
		asks("privileges", "VALIDATION", "privileged").config("privileged", true),
		asks("capabilities by configuration", "VALIDATION", "cap_add").config("cap_add", []string{"ALL"}),
		asks("the host's processes", "VALIDATION", "pid_mode").config("pid_mode", "host"),
		asks("no filter", "VALIDATION", "security_opt").config("security_opt", []string{"seccomp=unconfined"}),
		asks("devices by configuration", "VALIDATION", "devices").config("devices", []string{"/dev/mem"}),
		asks("labels", "VALIDATION", "labels").config("labels", object{labelExpires: "1"}),
		asks("a working directory in a descriptor", "VALIDATION", "working_dir").config("working_dir", "/tmp/../proc/self/fd/8"),
		asks("the job's variables", "VALIDATION", "runner's own").config("environment", object{"SPECQL_JOB_ID": "x"}),
		asks("a variable in a variable", "VALIDATION", "not the name").config("environment", object{"A=1\nLD_PRELOAD": "x"}),
		asks("options of a tmpfs", "VALIDATION", "option").config("tmpfs", []string{"/x:size=1m,suid,dev"}),
		asks("a tmpfs over /proc", "VALIDATION", "not to be covered").config("tmpfs", []string{"/x/../proc/sys"}),
		asks("a mount in a writable volume", "VALIDATION", "writable volume").config("tmpfs", []string{"/data/x"}).
			config("volumes", []object{{"host_path": filepath.Dir(a.secret), "container_path": "/data", "mode": "rw"}}),
		asks("the input as code", "VALIDATION", "run as code").config("entrypoint", []string{"/bin/sh", "-c"}).config("command", []string{"$input.x"}),
		asks("a secret of the mesh", "POLICY_VIOLATION", "belongs to the mesh").config("registry_auth", object{"username_env_var": "SPECQL_TOKEN", "password_env_var": "DATABASE_URL"}),
		{
			name: "so many processes that the limit is none", call: call{args: []string{"args"}, policy: object{"resource_limits": object{"processes": int64(1<<63 - 1), "memory_mb": 1e300, "cpu_cores": 1e300, "timeout_seconds": 1e300}}},
			check: func(t *testing.T, out *runnertest.Outcome) {
				t.Helper()
				require.Contains(t, out.Finished.GetSecurity().GetIsolation(), "processes_limit")
			},
		},
		mounting("the host", "/", "whole host"),
		mounting("the engine's socket", a.engine, "never be mounted"),
		mounting("a directory above the engine's socket", filepath.Dir(a.engine), "never be mounted"),
		mounting("a socket", a.socket, "only directories and regular files"),
		mounting("/proc", "/proc/1/root", "never be mounted"),
		mounting("/sys", "/sys/fs/cgroup", "never be mounted"),
		mounting("/dev", "/dev/shm", "never be mounted"),
		mounting("/etc", "/srv/../etc", "never be mounted"),
		mounting("the engine's data", "/var/lib/docker/volumes", "never be mounted"),
		mounting("what holds the engine's data", "/var/lib", "never be mounted"),
		mounting("programs", "/usr/local/bin", "never be mounted"),
		mounting("timed jobs", "/var/spool/cron", "never be mounted"),
		mounting("other jobs' output", a.r.state.own(), "never be mounted"),
		mounting("/etc by another name", a.alias, "never be mounted"),
		mounting("/etc by another name of its parent", filepath.Dir(a.alias), "never be mounted"),
		mounting("a file of /etc by another name", filepath.Join(a.alias, "passwd"), "never be mounted"),
		mounting("/proc by another name", filepath.Join(a.jail, "proc", "sys"), "belongs to the kernel"),
		mounting("a tree with another /proc in it", a.jail, "belongs to the kernel"),
	}
	for _, name := range []string{"../../etc/passwd", "x/../../y", "-v", "a b", "a\nb", "a\x00b", "x/UPPER", "x@sha256:12", "http://x/y", "x:y:z", strings.Repeat("x/", 5000) + "x", "ｘ/y", "sha256:" + strings.Repeat("g", 64)} {
		suite = append(suite, asks("image "+strconv.QuoteToASCII(clip(name)), "VALIDATION", "is not an image").config("image", name).policy("allowed_images", []string{"*"}))
	}
	return suite
}

// attempt makes one attempt and requires that it gets nothing and leaves nothing.
func (a *arena) attempt(t *testing.T, h hostile) {
	t.Helper()
	var out *runnertest.Outcome
	if h.cancel == "" {
		out = h.call.runOn(t, a.r)
	} else {
		job := h.call.job(t)
		running := runnertest.Begin(t, runnertest.Start(t, a.r), job)
		running.Line(h.cancel)
		running.Cancel("enough")
		out = running.Wait()
		require.NoError(t, out.Err)
		requireGone(t, job.GetId())
	}
	require.Contains(t, append(strings.Fields(h.code), "")[:max(1, len(strings.Fields(h.code)))], out.Code(), "%v %s", out.Finished.GetError(), out.Finished.GetOutput())
	require.Contains(t, out.Finished.GetError().GetMessage(), h.text)
	if h.want != "" {
		var answer struct{ Got map[string]string }
		require.NoError(t, json.Unmarshal(out.Finished.GetOutput(), &answer), "%s", out.Finished.GetOutput())
		require.NotEmpty(t, answer.Got, "%s", out.Finished.GetOutput())
		for try, got := range answer.Got {
			require.Contains(t, strings.Fields(h.want), got, "%s: %s (%v)", h.name, try, answer.Got)
		}
	}
	if h.check != nil {
		h.check(t, out)
	}
	usage, security := out.Finished.GetUsage(), out.Finished.GetSecurity()
	require.Positive(t, usage.GetDurationSeconds())
	require.NotContains(t, out.Finished.String(), "the-runner's-own")
	if h.code == "POLICY_VIOLATION" {
		require.True(t, slices.ContainsFunc(security.GetChecks(), func(c *runnerv1.PolicyCheck) bool { return !c.GetAllowed() }), "the denial is on record")
	}
	if security.GetPolicyDigest() == "" {
		require.Equal(t, "VALIDATION", h.code)
	}
	if h.blocked {
		require.Nil(t, usage.ExitCode, "nothing ran")
		require.Nil(t, usage.CpuSeconds)
		return
	}
	if usage.ExitCode == nil {
		require.Equal(t, "VALIDATION", h.code, "only what could not be started has used nothing")
		return
	}
	// What it used is known, and what held it is told.
	require.NotNil(t, usage.CpuSeconds, "%v", out.Finished.GetError())
	require.NotEmpty(t, usage.GetExecutedVersion())
	if mode, _ := cgroup.Detect(); mode != cgroup.None && !a.r.cgroupsMissing.Load() {
		require.Equal(t, "cgroup", usage.GetSource())
		require.Positive(t, usage.GetPeakMemoryMb())
	}
	require.Subset(t, security.GetIsolation(), []string{"capabilities_dropped", "no_new_privileges", "private_namespaces", "seccomp", "processes_limit", "read_only_root"})
}

// TestHostile lets workflows, images and programs attempt what they can think of.
func TestHostile(t *testing.T) {
	a := newArena(t)
	suite := a.suite()
	t.Run("attempts", func(t *testing.T) {
		gate := make(chan struct{}, 4) // so many at once: a timeout is to be the attempt's own
		for i, h := range suite {
			t.Run(fmt.Sprintf("%03d %s", i, h.name), func(t *testing.T) {
				t.Parallel()
				gate <- struct{}{}
				defer func() { <-gate }()
				a.attempt(t, h)
			})
		}
	})
	// Nothing of any of them is left.
	byRunner := make(client.Filters).Add("label", labelRunner+"="+a.r.owner.instance)
	containers, err := a.r.client.ContainerList(t.Context(), client.ContainerListOptions{All: true, Filters: byRunner})
	require.NoError(t, err)
	require.Empty(t, containers.Items)
	volumes, err := a.r.client.VolumeList(t.Context(), client.VolumeListOptions{Filters: make(client.Filters).Add("dangling", "true")})
	require.NoError(t, err)
	for _, v := range volumes.Items {
		require.NotContains(t, v.Labels, labelRunner)
	}
	left, err := os.ReadDir(a.r.state.own())
	require.NoError(t, err)
	require.Len(t, left, 1, "the file that says whose the directory is")
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	require.NotContains(t, string(mounts), a.r.owner.instance)
	for _, group := range groupsOf(t, os.Getpid()) {
		jobs, err := filepath.Glob(filepath.Join(group, "*", "cgroup.procs"))
		require.NoError(t, err)
		require.Empty(t, jobs)
	}
	text, err := os.ReadFile(a.secret)
	require.NoError(t, err)
	require.Equal(t, "the machine's", string(text))
	entries, err := os.ReadDir(filepath.Dir(a.secret))
	require.NoError(t, err)
	require.Len(t, entries, 4, "nothing was written there")
	out, err := exec.CommandContext(t.Context(), "ps", "-eo", "args").Output()
	require.NoError(t, err)
	require.NotContains(t, string(out), "/probe attack")
	require.NotContains(t, string(out), "/probe endless")
}

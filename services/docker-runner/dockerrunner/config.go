package dockerrunner

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/runner"
)

// Config is the runner_config of a docker service.
type Config struct {
	Image        string                   `json:"image" jsonschema:"minLength=1,description=Image to run: a name with a tag or a digest or an image ID"`
	Command      []string                 `json:"command,omitempty" jsonschema:"description=Arguments; $input.field is replaced from the input"`
	Entrypoint   []string                 `json:"entrypoint,omitempty" jsonschema:"description=Program over the image's own entrypoint"`
	WorkingDir   string                   `json:"working_dir,omitempty" jsonschema:"description=Absolute working directory in the container"`
	Environment  map[string]runner.Scalar `json:"environment,omitempty" jsonschema:"description=Variables added to the image's own; nothing is taken from the runner"`
	Volumes      []Volume                 `json:"volumes,omitempty" jsonschema:"description=Host directories and files to mount"`
	NetworkMode  string                   `json:"network_mode,omitempty" jsonschema:"description=none (default) or bridge or a network's name"`
	User         string                   `json:"user,omitempty" jsonschema:"description=User or user:group of the process"`
	ReadOnly     *bool                    `json:"read_only,omitempty" jsonschema:"description=Whether the root file system is read-only (default true),default=true"`
	Tmpfs        []string                 `json:"tmpfs,omitempty" jsonschema:"description=In-memory directories: /path or /path:size=64m or /path:size=64m:exec"`
	PullPolicy   string                   `json:"pull_policy,omitempty" jsonschema:"enum=if_not_present,enum=always,enum=never,description=When to pull the image (default if_not_present)"`
	RegistryAuth *RegistryAuth            `json:"registry_auth,omitempty" jsonschema:"description=Credentials for pulling"`
	CreatedAhead int                      `json:"created_ahead,omitempty" jsonschema:"minimum=0,maximum=16,description=How many containers are kept created for jobs to come (default 0); each is used once"`
	Timeout      float64                  `json:"timeout,omitempty" jsonschema:"exclusiveMinimum=0,description=Longest time of an attempt in seconds"`
}

// Volume is one mount of a host path.
type Volume struct {
	HostPath      string `json:"host_path" jsonschema:"minLength=1,description=Absolute path on the engine's host"`
	ContainerPath string `json:"container_path" jsonschema:"minLength=1,description=Absolute path in the container"`
	Mode          string `json:"mode,omitempty" jsonschema:"enum=ro,enum=rw,description=ro (default) or rw"`
}

// RegistryAuth names the variables that hold the credentials of a registry.
type RegistryAuth struct {
	UsernameEnvVar string `json:"username_env_var" jsonschema:"minLength=1,description=Variable of the runner that holds the user name"`
	PasswordEnvVar string `json:"password_env_var" jsonschema:"minLength=1,description=Variable of the runner that holds the password or token"`
}

// Operation holds the keys of an operation that say how the call is made.
type Operation struct {
	Command []string `json:"command,omitempty" jsonschema:"description=Arguments over the service's command"`
}

// Policy is the security_policy of a docker service, and the operator's ceiling.
type Policy struct {
	AllowedImages      []string            `json:"allowed_images,omitempty" jsonschema:"description=Images that may run: name:tag or name@digest or image ID or repo/*; none where absent"`
	AllowedNetworks    []string            `json:"allowed_networks,omitempty" jsonschema:"description=Networks that may be used besides none"`
	VolumeRestrictions *VolumeRestrictions `json:"volume_restrictions,omitempty" jsonschema:"description=What may be mounted; where absent only read-only mounts outside the system's own directories"`
	AllowedEnvVars     []string            `json:"allowed_env_vars,omitzero" jsonschema:"description=Variables of the runner that registry_auth may name: exact names or PREFIX_*; all where absent"`
	ResourceLimits     *ResourceLimits     `json:"resource_limits,omitempty" jsonschema:"description=Upper bounds of what a container uses"`
}

// VolumeRestrictions bounds the mounts.
type VolumeRestrictions struct {
	AllowedHostPaths []string `json:"allowed_host_paths,omitempty" jsonschema:"description=Host paths that may be mounted with everything below them"`
	MaxVolumes       *int     `json:"max_volumes,omitempty" jsonschema:"minimum=0,description=Greatest number of mounts"`
}

// ResourceLimits bounds what a container uses. Zero means no bound.
type ResourceLimits struct {
	CPUCores       float64 `json:"cpu_cores,omitempty" jsonschema:"minimum=0.01,description=CPU cores"`
	MemoryMB       float64 `json:"memory_mb,omitempty" jsonschema:"minimum=6,description=Memory in MiB; swap is not added"`
	DiskMB         float64 `json:"disk_mb,omitempty" jsonschema:"minimum=1,description=Writable space in MiB"`
	Processes      int64   `json:"processes,omitempty" jsonschema:"minimum=1,description=Processes and threads"`
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty" jsonschema:"exclusiveMinimum=0,description=Longest time of an attempt in seconds"`
}

// Values of pull_policy.
const (
	pullIfNotPresent = "if_not_present"
	pullAlways       = "always"
	pullNever        = "never"
)

// Networks with a meaning of their own.
const (
	networkNone   = "none"
	networkBridge = "bridge"
)

// outputMount is where a container may leave its output.
const (
	outputMount = "/specql"
	outputFile  = "output.json"
)

func (c *Config) readOnly() bool { return c.ReadOnly == nil || *c.ReadOnly }

func (c *Config) network() string {
	switch c.NetworkMode {
	case "":
		return networkNone
	case "default":
		return networkBridge
	default:
		return c.NetworkMode
	}
}

func (c *Config) pullPolicy() string {
	if c.PullPolicy == "" {
		return pullIfNotPresent
	}
	return c.PullPolicy
}

// Bounds of a configuration, far above what a service needs.
const (
	maxVolumes     = 64
	maxTmpfs       = 16
	maxEnvironment = 512
	maxArguments   = 1024
)

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)

// check finds what the schema cannot: it needs no engine and no policy.
func (c *Config) check(denied deniedPaths) []runner.Problem {
	var found []runner.Problem
	add := func(path, mend, format string, args ...any) {
		found = append(found, runner.Problem{Path: "runner_config." + path, Message: fmt.Sprintf(format, args...), Mend: mend})
	}
	if c.Image != "" {
		if _, err := parseImage(c.Image); err != nil {
			add("image", "write name:tag, name@sha256:… or an image ID", "%q is not an image: %v", clip(c.Image), err)
		}
	}
	if why := forbiddenNetwork(c.NetworkMode); why != "" {
		add("network_mode", "use none, bridge or the name of a network made for this", "%s", why)
	}
	if c.WorkingDir != "" && !containerPath(c.WorkingDir) {
		add("working_dir", "write an absolute path", "%q is not an absolute path in the container", clip(c.WorkingDir))
	} else if kernelTarget(c.WorkingDir) {
		add("working_dir", "work elsewhere", "%s", kernelTargetText)
	}
	if strings.ContainsAny(c.User, "\x00\n") || len(c.User) > 256 {
		add("user", "write user, uid, user:group or uid:gid", "not a user")
	}
	if len(c.Environment) > maxEnvironment {
		add("environment", "", "more than %d variables", maxEnvironment)
	}
	for name, value := range c.Environment {
		switch {
		case !envName.MatchString(name) || len(name) > 256:
			add("environment."+clip(name), "use letters, digits and _", "%q is not the name of a variable", clip(name))
		case strings.HasPrefix(name, "SPECQL_"):
			add("environment."+clip(name), "choose another name", "names that begin with SPECQL_ are the runner's own")
		case strings.ContainsRune(string(value), 0):
			add("environment."+clip(name), "", "holds a NUL byte")
		}
	}
	checkArguments("command", c.Command, add)
	checkArguments("entrypoint", c.Entrypoint, add)
	for _, i := range inputInCode(c.Entrypoint, c.Command, c.Command) {
		add(fmt.Sprintf("command[%d]", i), inputInCodeMend, "%s", inputInCodeText)
	}
	if auth := c.RegistryAuth; auth != nil {
		for at, name := range map[string]string{"username_env_var": auth.UsernameEnvVar, "password_env_var": auth.PasswordEnvVar} {
			if runner.OwnVariable(name) {
				add("registry_auth."+at, "keep the credentials in a variable of their own", "%s belongs to the mesh itself and is given to no service", name)
			}
		}
	}
	c.aheadRefused(add)
	const ours = "the runner's output directory"
	taken := map[string]string{outputMount: ours}
	take := func(at, target string) {
		switch {
		case !containerPath(target):
			add(at, "write an absolute path below /", "%q is not an absolute path in the container", clip(target))
		case systemTarget(target):
			add(at, "mount it elsewhere", "%q is a part of the container that is not to be covered", clip(target))
		case taken[path.Clean(target)] != "":
			add(at, "use every path once", "%q is already %s", clip(target), taken[path.Clean(target)])
		default:
			taken[path.Clean(target)] = at
		}
	}
	if len(c.Volumes) > maxVolumes {
		add("volumes", "", "more than %d volumes", maxVolumes)
	}
	for i, v := range c.Volumes {
		at := fmt.Sprintf("volumes[%d]", i)
		take(at+".container_path", v.ContainerPath)
		if !path.IsAbs(v.HostPath) || strings.ContainsRune(v.HostPath, 0) {
			add(at+".host_path", "write the absolute path on the host", "%q is not an absolute path", clip(v.HostPath))
		} else if why := denied.why(path.Clean(v.HostPath)); why != "" {
			add(at+".host_path", "mount a directory made for this", "%q must never be mounted: %s", clip(v.HostPath), why)
		}
	}
	if len(c.Tmpfs) > maxTmpfs {
		add("tmpfs", "", "more than %d in-memory directories", maxTmpfs)
	}
	for i, text := range c.Tmpfs {
		at := fmt.Sprintf("tmpfs[%d]", i)
		t, err := parseTmpfs(text)
		if err != nil {
			add(at, "write /path or /path:size=64m", "%v", err)
			continue
		}
		take(at, t.target)
	}
	for target, at := range taken {
		if at == ours {
			continue // nothing holds it: what lies above is refused
		}
		for _, v := range c.Volumes {
			// The engine makes the place of a mount where it is not there: on the host, in this case,
			// and what a container puts in its way is on the host, too.
			if outer := path.Clean(v.ContainerPath); v.Mode == "rw" && outer != target && within(target, outer) {
				add(at, "mount it elsewhere", "%q lies in the writable volume %q", clip(target), clip(outer))
			}
		}
	}
	slices.SortStableFunc(found, func(a, b runner.Problem) int { return strings.Compare(a.Path, b.Path) })
	return found
}

// check finds what the schema cannot, for a service's configuration; paths are the operation's.
func (o *Operation) check(c *Config) []runner.Problem {
	var found []runner.Problem
	add := func(path, mend, format string, args ...any) {
		found = append(found, runner.Problem{Path: path, Message: fmt.Sprintf(format, args...), Mend: mend})
	}
	checkArguments("command", o.Command, add)
	c.argumentsAhead(o.Command, add)
	for _, i := range inputInCode(c.Entrypoint, o.Command, o.Command) {
		add(fmt.Sprintf("command[%d]", i), inputInCodeMend, "%s", inputInCodeText)
	}
	return found
}

func checkArguments(at string, args []string, add func(path, mend, format string, args ...any)) {
	if len(args) > maxArguments {
		add(at, "", "more than %d arguments", maxArguments)
		return
	}
	for i, arg := range args {
		switch {
		case strings.ContainsRune(arg, 0):
			add(fmt.Sprintf("%s[%d]", at, i), "", "holds a NUL byte")
		case len(arg) > maxArgument:
			add(fmt.Sprintf("%s[%d]", at, i), "pass it by the input", "is longer than the %d bytes that an argument may have", maxArgument)
		}
	}
}

// containerPath says whether p is a usable absolute path in a container.
func containerPath(p string) bool {
	return path.IsAbs(p) && len(p) < 4096 && !strings.ContainsAny(p, "\x00\n")
}

// systemTarget says whether a mount at p would cover what makes the container one.
func systemTarget(p string) bool {
	p = path.Clean(p)
	if p == "/" || within(p, outputMount) && p != outputMount {
		return true
	}
	return slices.ContainsFunc([]string{"/proc", "/sys", "/dev"}, func(s string) bool { return within(p, s) && p != "/dev/shm" })
}

// kernelTarget says whether p leads to the kernel's files. A runtime that does not close all of
// its own descriptors gives the host's files to whoever works in /proc/self/fd.
func kernelTarget(p string) bool {
	p = path.Clean("/" + p)
	return within(p, "/proc") || within(p, "/sys") || within(p, "/dev/fd")
}

const kernelTargetText = "a directory of the kernel's is not to be worked in"

// within says whether p is dir or below it. Both are clean.
func within(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

// tmpfs is an in-memory directory.
type tmpfs struct {
	target string
	bytes  int64
	sized  bool
	exec   bool
}

const defaultTmpfs = 64 << 20

func parseTmpfs(text string) (tmpfs, error) {
	target, options, _ := strings.Cut(text, ":")
	t := tmpfs{target: target, bytes: defaultTmpfs}
	for option := range strings.FieldsFuncSeq(options, func(r rune) bool { return r == ',' || r == ':' }) {
		switch size, isSize := strings.CutPrefix(option, "size="); {
		case option == "exec":
			t.exec = true
		case option == "noexec" || option == "rw" || option == "nosuid" || option == "nodev":
			// What it always is.
		case isSize:
			n, err := parseSize(size)
			if err != nil {
				return tmpfs{}, err
			}
			t.bytes, t.sized = n, true
		default:
			return tmpfs{}, fmt.Errorf("option %q is not one of size=N, exec", clip(option))
		}
	}
	return t, nil
}

func parseSize(text string) (int64, error) {
	number, unit := text, int64(1)
	if text != "" {
		switch text[len(text)-1] {
		case 'k', 'K':
			unit = 1 << 10
		case 'm', 'M':
			unit = 1 << 20
		case 'g', 'G':
			unit = 1 << 30
		}
		if unit > 1 {
			number = text[:len(text)-1]
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 1 || n > (1<<40)/unit {
		return 0, fmt.Errorf("size %q is not a number of bytes such as 64m", clip(text))
	}
	return n * unit, nil
}

// clip shortens text of a user for a message.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return strings.ToValidUTF8(s, "�")
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

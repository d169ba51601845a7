package shellrunner

import (
	"math"
	"slices"
	"strconv"

	"github.com/specql/mesh/pkg/runner"
)

// Config is the runner_config of a shell service.
type Config struct {
	WorkingDirectory string                   `json:"working_directory,omitempty" jsonschema:"description=Absolute path of the directory that commands run in and scripts are found in."`
	Environment      map[string]runner.Scalar `json:"environment,omitempty" jsonschema:"description=The variables of the command. Nothing is inherited from the runner."`
	Timeout          float64                  `json:"timeout,omitempty" jsonschema:"exclusiveMinimum=0,description=Seconds that one attempt may take."`
}

// Operation says how an operation of a shell service is called.
type Operation struct {
	// Command's values can begin with a dash: put "--" before a reference where the command
	// would take one for an option.
	Command []string `json:"command,omitempty" jsonschema:"minItems=1,description=The program and its arguments. $input.field is replaced in any of them."`
	Script  string   `json:"script,omitempty" jsonschema:"minLength=1,description=A file below working_directory that is run by the allowed interpreter of its ending."`
}

// Policy is the security_policy of a shell service and, as the operator's ceiling, of the runner.
type Policy struct {
	AllowedCommands              []string `json:"allowed_commands,omitempty" jsonschema:"description=Absolute paths of the programs that may run. Absent or empty: none may."`
	WorkingDirectoryRestrictions []string `json:"working_directory_restrictions,omitempty" jsonschema:"description=Absolute paths. The working directory must be one of them or lie below one."`
	NetworkAccess                string   `json:"network_access,omitempty" jsonschema:"enum=none,enum=localhost,enum=all,description=What the command may reach; none by default. localhost is a loopback of the job's own."`
	FileAccess                   string   `json:"file_access,omitempty" jsonschema:"enum=none,enum=read,enum=read_write,description=What the command may do in the working directory; read_write by default."`
	ResourceLimits               Limits   `json:"resource_limits,omitzero" jsonschema:"description=What the whole process tree of one job may use."`
}

// Limits are the resource_limits of a policy. Zero is no limit.
type Limits struct {
	CPUCores       float64 `json:"cpu_cores,omitempty" jsonschema:"exclusiveMinimum=0,description=Cores' worth of CPU time."`
	MemoryMB       int64   `json:"memory_mb,omitempty" jsonschema:"minimum=1,maximum=1073741824,description=Memory in MiB with swap."`
	DiskMB         int64   `json:"disk_mb,omitempty" jsonschema:"minimum=1,maximum=1073741824,description=Size in MiB of each file written and of the private temporary directory."`
	CPUSeconds     float64 `json:"cpu_seconds,omitempty" jsonschema:"exclusiveMinimum=0,description=CPU time in seconds."`
	Processes      int64   `json:"processes,omitempty" jsonschema:"minimum=1,maximum=4194304,description=Processes and threads at once; 1024 by default."`
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty" jsonschema:"exclusiveMinimum=0,description=Seconds that one attempt may take whatever else is configured."`
}

// The values of network_access and file_access, the narrowest first.
const (
	networkNone      = "none"
	networkLocalhost = "localhost"
	networkAll       = "all"
	fileNone         = "none"
	fileRead         = "read"
	fileReadWrite    = "read_write"
)

// defaultProcesses keeps a fork bomb from taking the machine where no limit is configured.
const defaultProcesses = 1024

// effective is what a job is held to: the registry's policy narrowed by the operator's ceiling.
// Its JSON form is what the policy digest is made of.
type effective struct {
	Policy  Policy  `json:"policy"`
	Ceiling *Policy `json:"ceiling,omitempty"`
	Limits  Limits  `json:"limits"`
	Network string  `json:"network"`
	Files   string  `json:"files"`
}

func narrow(p Policy, ceiling *Policy) effective {
	e := effective{Policy: p, Ceiling: ceiling, Limits: p.ResourceLimits, Network: p.NetworkAccess, Files: p.FileAccess}
	if e.Network == "" {
		e.Network = networkNone
	}
	if e.Files == "" {
		e.Files = fileReadWrite
	}
	if ceiling != nil {
		c := ceiling.ResourceLimits
		e.Limits = Limits{
			CPUCores: smaller(e.Limits.CPUCores, c.CPUCores), MemoryMB: smaller(e.Limits.MemoryMB, c.MemoryMB),
			DiskMB: smaller(e.Limits.DiskMB, c.DiskMB), CPUSeconds: smaller(e.Limits.CPUSeconds, c.CPUSeconds),
			Processes: smaller(e.Limits.Processes, c.Processes), TimeoutSeconds: smaller(e.Limits.TimeoutSeconds, c.TimeoutSeconds),
		}
		e.Network = narrower([]string{networkNone, networkLocalhost, networkAll}, e.Network, ceiling.NetworkAccess)
		e.Files = narrower([]string{fileNone, fileRead, fileReadWrite}, e.Files, ceiling.FileAccess)
	}
	if e.Limits.Processes == 0 {
		e.Limits.Processes = defaultProcesses
	}
	return e
}

// smaller takes the smaller limit, where zero is none.
func smaller[N int64 | float64](a, b N) N {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// narrower takes the value that comes first in order; an empty ceiling does not narrow.
func narrower(order []string, value, ceiling string) string {
	if ceiling == "" {
		return value
	}
	return order[max(0, min(slices.Index(order, value), slices.Index(order, ceiling)))]
}

// check finds values that no schema check has seen, so that none can disarm a limit.
func (l Limits) check() string {
	for name, v := range map[string]float64{
		"cpu_cores": l.CPUCores, "cpu_seconds": l.CPUSeconds, "timeout_seconds": l.TimeoutSeconds,
		"memory_mb": float64(l.MemoryMB), "disk_mb": float64(l.DiskMB), "processes": float64(l.Processes),
	} {
		if v < 0 || math.IsNaN(v) || v > 1<<30 {
			return "resource_limits." + name + " is " + strconv.FormatFloat(v, 'g', -1, 64) + "; write a number above 0 and at most 1073741824"
		}
	}
	return ""
}

package dockerrunner

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func validate(t *testing.T, config, policy string, ops ...runner.Operation) (problems, warnings map[string]string) {
	t.Helper()
	found, err := shared.runner.Validate(t.Context(), &runner.Service{
		Name: "s", ExecutionType: ExecutionType, Config: json.RawMessage(config), Policy: json.RawMessage(policy), Operations: ops,
	})
	require.NoError(t, err)
	problems, warnings = map[string]string{}, map[string]string{}
	for _, p := range found {
		require.NotEmpty(t, p.Message)
		require.NotContains(t, problems, p.Path, "said once")
		if p.Warning {
			warnings[p.Path] = p.Message + " / " + p.Mend
		} else {
			problems[p.Path] = p.Message + " / " + p.Mend
		}
	}
	return problems, warnings
}

func TestValidateTheGuidesService(t *testing.T) {
	problems, warnings := validate(t, `{"image":"python:3.11-slim","command":["python","predict.py"],"working_dir":"/app",
		"volumes":[{"host_path":"/models","container_path":"/models","mode":"ro"}]}`,
		`{"allowed_images":["python:3.11-slim"],"resource_limits":{"cpu_cores":2.0,"memory_mb":2048,"disk_mb":5120}}`, runner.Operation{Name: "predict"})
	require.Empty(t, problems)
	require.Empty(t, warnings)
}

func TestValidateFindsEverything(t *testing.T) {
	problems, warnings := validate(t, `{"imag":"x","image":"UP","network_mode":"host","comand":["a"],"command":"no list","working_dir":"app","pull_policy":"sometimes",
		"environment":{"A B":"1","SPECQL_X":"2","PORT":8080,"BAD":[]},"tmpfs":["/x:size=ten","/y","/y"],
		"volumes":[{"host_path":"/etc","container_path":"/data"},{"host_path":"rel","container_path":"/data"},{"host_path":"/srv/x","container_path":"/proc"},{"host_path":7,"container_path":"/seven"}],
		"registry_auth":{"username_env_var":"DATABASE_URL","password_env_var":"OTHER"}}`,
		`{"allowed_image":["a"],"allowed_images":["a*b"],"allowed_networks":["host"],"allowed_env_vars":["A-B","PAY_*"],
		"volume_restrictions":{"allowed_host_paths":["x","/etc"]},"resource_limits":{"memory_mb":1,"cpu_cores":"two"}}`,
		runner.Operation{Name: "run", Config: json.RawMessage(`{"comand":["x"],"command":["sh","-c","$input.x"]}`)})
	for path, part := range map[string]string{
		"runner_config.imag":                                        "image",
		"runner_config.comand":                                      "command",
		"runner_config.command":                                     "array",
		"runner_config.image":                                       "not an image",
		"runner_config.pull_policy":                                 "if_not_present",
		"runner_config.network_mode":                                "never shared",
		"runner_config.working_dir":                                 "absolute",
		"runner_config.environment.A B":                             "name of a variable",
		"runner_config.environment.SPECQL_X":                        "SPECQL_",
		"runner_config.environment.BAD":                             "string",
		"runner_config.tmpfs[0]":                                    "size",
		"runner_config.tmpfs[2]":                                    "already",
		"runner_config.volumes[0].host_path":                        "never be mounted",
		"runner_config.volumes[1].host_path":                        "absolute",
		"runner_config.volumes[1].container_path":                   "already",
		"runner_config.volumes[2].container_path":                   "covered",
		"runner_config.volumes[3].host_path":                        "must be a string",
		"runner_config.registry_auth.username_env_var":              "mesh itself",
		"security_policy.allowed_image":                             "allowed_images",
		"security_policy.allowed_images[0]":                         "not an image",
		"security_policy.allowed_networks[0]":                       "never shared",
		"security_policy.allowed_env_vars[0]":                       "PREFIX_*",
		"security_policy.volume_restrictions.allowed_host_paths[0]": "absolute",
		"security_policy.resource_limits.memory_mb":                 "6",
		"security_policy.resource_limits.cpu_cores":                 "number",
		"operations.run.comand":                                     "command",
		"operations.run.command[2]":                                 "run as code",
	} {
		require.Contains(t, problems[path], part, "%s: %v", path, problems)
		delete(problems, path)
	}
	require.Empty(t, problems)
	require.Contains(t, warnings, "security_policy.volume_restrictions.allowed_host_paths[1]")
	require.Contains(t, warnings["runner_config.registry_auth.password_env_var"], "allowed_env_vars")

	problems, warnings = validate(t, `{"image":"a","network_mode":"bridge","volumes":[{"host_path":"/srv/x","container_path":"/x","mode":"rw"}]}`, `{}`)
	require.Empty(t, problems, "what a policy forbids is a warning: the operator may yet allow it")
	require.Contains(t, warnings["runner_config.image"], "allowed_images")
	require.Contains(t, warnings, "runner_config.network_mode")
	require.Contains(t, warnings, "runner_config.volumes[0]")
}

func TestNoEngine(t *testing.T) {
	r := newRunner(t, Options{Host: "unix:///no/such/docker.sock"})
	err := r.Ping(t.Context())
	f, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, fault.Unavailable, f.Code)
	require.Contains(t, f.Message, "DOCKER_HOST")
	d, err := r.Describe(t.Context())
	require.NoError(t, err)
	require.Equal(t, "docker_engine", d.Isolation[0].Name)
	require.False(t, d.Isolation[0].Available)
	require.Contains(t, d.Isolation[0].Detail, "no Docker engine answers")

	job := call{config: object{"image": "specql-test/x"}}.job(t)
	out := runnertest.Execute(t, runnertest.Start(t, r), job)
	_, message := failed(t, out, "UNAVAILABLE")
	require.True(t, out.Finished.GetError().GetRetryable())
	require.Contains(t, message, "no Docker engine answers")

	_, err = New(Options{Host: "not an address"})
	require.ErrorContains(t, err, "docker engine address")
}

func TestDescribe(t *testing.T) {
	needEngine(t)
	d, err := shared.runner.Describe(t.Context())
	require.NoError(t, err)
	require.Len(t, d.Types, 1)
	require.Zero(t, d.Types[0].DefaultMaxRetries, "a container's work may not bear repeating")
	for _, f := range d.Isolation {
		switch f.Name {
		case "mandatory_access_control", "user_namespace", "private_socket": // as the engine was started
			require.Equal(t, f.Available, f.Detail == "", "what is missing is told: %s", f.Name)
		default:
			require.True(t, f.Available, "%s: %s", f.Name, f.Detail)
		}
	}
}

func TestDeniedHostPaths(t *testing.T) {
	data := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(data, link))
	own, err := newDeniedPaths("private", filepath.Join(link, "not", "yet"), "")
	require.NoError(t, err)
	for _, p := range []string{
		"/", "/etc", "/etc/passwd", "/proc/1", "/var", "/run/x", "/usr", "/root", "/home/x/docker.sock", "/var/lib/docker/volumes", "/lib64",
		"/home", "/home/ada", "/home/ada/.ssh", "/home/ada/.aws/credentials", data, filepath.Join(data, "not", "yet", "x"), filepath.Join(link, "not"),
	} {
		require.NotEmpty(t, own.why(p), p)
	}
	for _, p := range []string{"/models", "/srv", "/home/ada/data", "/root/project", "/var/data", "/etcetera", "/usr/share/data", "/tmp/x", filepath.Join(data, "other")} {
		require.Empty(t, own.why(p), p)
	}
}

func TestInputInCode(t *testing.T) {
	problems, _ := validate(t, `{"image":"a","command":["python3","-c","print($input.x)"]}`, `{"allowed_images":["a"]}`,
		runner.Operation{Name: "shell", Config: json.RawMessage(`{"command":["/bin/sh","-ec","echo $input.x"]}`)},
		runner.Operation{Name: "fine", Config: json.RawMessage(`{"command":["/bin/sh","-c","echo \"$1\" $$input.x","name","$input.x"]}`)})
	require.Contains(t, problems["runner_config.command[2]"], "sys.argv[1]")
	require.Contains(t, problems["operations.shell.command[2]"], "run as code")
	require.Len(t, problems, 2)
	problems, _ = validate(t, `{"image":"a","entrypoint":["bash","-c"],"command":["$input.x"]}`, `{"allowed_images":["a"]}`)
	require.Contains(t, problems, "runner_config.command[0]")
}

func TestFillArguments(t *testing.T) {
	input := json.RawMessage(`{"a":{"b":[1,"two",null,{"c":true}]},"s":"x y","nul":"a\u0000b","long":"` + strings.Repeat("x", maxArgument) + `"}`)
	got, err := fillArguments([]string{"$input.s", "<$input.a.b[1]>", "$input.a.b[3].c", "$input.a.b[2]", "$inputs.s", "$$input.s.", "$input.a.b"}, input)
	require.NoError(t, err)
	require.Equal(t, []string{"x y", "<two>", "true", "null", "$inputs.s", "$input.s.", `[1,"two",null,{"c":true}]`}, got)
	for arg, want := range map[string]string{"$$input": "$input", "a$$input.a.b[0]c": "a$input.a.b[0]c", "$$$input.s": "$$input.s", "$$input.s$input.s": "$input.sx y", "$5": "$5"} {
		got, err := fillArguments([]string{arg}, input)
		require.NoError(t, err)
		require.Equal(t, want, got[0], arg)
	}
	whole, err := fillArguments([]string{"$input"}, json.RawMessage(`{"a":1}`))
	require.NoError(t, err)
	require.JSONEq(t, `{"a":1}`, whole[0])
	for arg, part := range map[string]string{
		"$input.x":        "it has: a, long, nul, s",
		"$input.a.b[9]":   "4 items",
		"$input.a.b.c":    "list of 4 items",
		"$input.s.t":      "has no fields",
		"$input.nul":      "NUL",
		"x$input.long":    "stdin instead",
		"$input[0]":       "no field",
		"$input.a.b[9999": "",
	} {
		_, err := fillArguments([]string{arg}, input)
		if part == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, part, arg)
	}
	_, err = fillArguments([]string{"$input.x"}, json.RawMessage(`{`))
	require.Error(t, err)
}

func TestOutputNesting(t *testing.T) {
	nested := func(n int) []byte { return []byte(strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n)) }
	_, err := streamOutput(nested(maxDepth), "", 0)
	require.NoError(t, err)
	_, err = streamOutput(nested(maxDepth+1), "", 0)
	require.ErrorContains(t, err, "deeper")
	out, err := streamOutput([]byte(`{"a":"[[[{{{\"[["}`), "", 0)
	require.NoError(t, err)
	require.JSONEq(t, `{"a":"[[[{{{\"[["}`, string(out))
	out, err = streamOutput([]byte("{\"a\":1}\n{\"a\":2}\n\n"), "", 0)
	require.NoError(t, err)
	require.JSONEq(t, `{"a":2}`, string(out))
	_, err = streamOutput(make([]byte, maxOutput), "", 0)
	require.ErrorContains(t, err, "4 MiB", "NUL bytes grow sixfold in JSON")
}

// The stats of an engine say something of a run only if they saw most of it.
func TestStatsThatSawTooLittle(t *testing.T) {
	sample := &container.StatsResponse{}
	sample.CPUStats.CPUUsage.TotalUsage = 2e9
	sample.MemoryStats.Usage, sample.MemoryStats.MaxUsage = 10<<20, 20<<20
	sample.BlkioStats.IoServiceBytesRecursive = []container.BlkioStatEntry{{Op: "Read", Value: 1 << 20}, {Op: "write", Value: 2 << 20}}
	sample.Networks = map[string]container.NetworkStats{"eth0": {RxBytes: 3 << 20, TxBytes: 4 << 20}}
	var m meter
	m.start()
	m.take(sample)
	m.take(&container.StatsResponse{}) // what an engine sends of a container that has ended
	m.started = m.sampled.Add(-time.Second)
	m.ended = m.sampled.Add(500 * time.Millisecond)
	u := m.final()
	require.Equal(t, "docker", u.GetSource())
	require.InDelta(t, 2, u.GetCpuSeconds(), 1e-9)
	require.InDelta(t, 20, u.GetPeakMemoryMb(), 1e-9)
	require.InDelta(t, 1, u.GetDiskReadMb(), 1e-9)
	require.InDelta(t, 2, u.GetDiskWriteMb(), 1e-9)
	require.InDelta(t, 3, u.GetNetworkRxMb(), 1e-9)
	require.InDelta(t, 4, u.GetNetworkTxMb(), 1e-9)
	m.ended = m.sampled.Add(time.Minute)
	u = m.final()
	require.Nil(t, u.CpuSeconds)
	require.Nil(t, u.PeakMemoryMb)
	require.Nil(t, u.NetworkRxMb)
}

// A kernel that does not see buffered writes counts none: that is no measurement.
func TestWhatWasNotMeasuredIsAbsent(t *testing.T) {
	sample := &container.StatsResponse{}
	sample.CPUStats.CPUUsage.TotalUsage = 2e9
	sample.BlkioStats.IoServiceBytesRecursive = []container.BlkioStatEntry{{Op: "Read", Value: 1 << 20}, {Op: "Write", Value: 0}}
	m := meter{buffered: true}
	m.start()
	m.take(sample)
	u := m.final()
	require.Nil(t, u.DiskWriteMb)
	require.InDelta(t, 1, u.GetDiskReadMb(), 1e-9)
	m = meter{}
	m.take(sample)
	require.NotNil(t, m.final().DiskWriteMb)
}

package shellrunner

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

func TestValidate(t *testing.T) {
	r := newRunner(t, Options{})
	dir := t.TempDir()
	file(t, dir, "run.py", "")
	file(t, dir, "run2.sh", "")
	type want struct {
		path, text string
		warning    bool
	}
	for name, tt := range map[string]struct {
		config, policy string
		operations     map[string]string
		want           []want
	}{
		"good": {
			config: `{"working_directory":"DIR","environment":{"PYTHONPATH":"/app"},"timeout":3}`, policy: `{"allowed_commands":["/usr/bin/python3"],"resource_limits":{"cpu_cores":1.0,"memory_mb":512,"disk_mb":1024}}`,
			operations: map[string]string{"run": `{}`, "other": `{"script":"run.py"}`, "cmd": `{"command":["python3","$input.file"]}`},
		},
		"unknown keys": {
			config: `{"working_dir":"/x"}`, policy: `{"allowed_comands":[]}`, operations: map[string]string{"a": `{"comand":["x"]}`},
			want: []want{{"runner_config.working_dir", "unknown key", false}, {"operations.a.comand", "unknown key", false}, {"security_policy.allowed_comands", "unknown key", false}},
		},
		"types": {
			config: `{"environment":{"A":[1],"PORT":8080,"DEBUG":true},"timeout":-1}`, policy: `{"network_access":"some","resource_limits":{"memory_mb":0,"processes":1.5}}`,
			want: []want{
				{"runner_config.environment.A", "", false},
				{"runner_config.timeout", "", false},
				{"security_policy.network_access", "not a known value", false},
				{"security_policy.resource_limits.memory_mb", "", false},
				{"security_policy.resource_limits.processes", "", false},
				{"security_policy.allowed_commands", "nothing may run", true},
			},
		},
		"a seed": {
			config: `{"working_directory":"/app/scripts","environment":{"PYTHONPATH":"/app","LOG_LEVEL":"INFO"}}`,
			policy: `{"allowed_commands":["/usr/bin/python","/usr/bin/bash"],"resource_limits":{"cpu_cores":1.0,"memory_mb":512,"disk_mb":1024}}`, operations: map[string]string{"process_data": `{}`},
			want: []want{{"runner_config.working_directory", "does not exist", true}, {"security_policy.allowed_commands[0]", "does not exist", true}},
		},
		"nothing allowed": {
			config: `{}`, policy: `{}`, operations: map[string]string{"a": `{"command":["/bin/true"]}`},
			want: []want{{"security_policy.allowed_commands", "nothing may run", true}, {"operations.a.command[0]", "not in allowed_commands", true}},
		},
		"paths": {
			config: `{"working_directory":"work"}`, policy: `{"allowed_commands":["python3","/usr/bin"],"working_directory_restrictions":["x"]}`, operations: map[string]string{"a": `{"command":["bin/x"]}`, "b": `{"command":[""]}`},
			want: []want{
				{"runner_config.working_directory", "relative", false},
				{"security_policy.allowed_commands[0]", "not an absolute path", false},
				{"security_policy.allowed_commands[1]", "not an executable", true},
				{"security_policy.working_directory_restrictions[0]", "not an absolute path", false},
				{"operations.a.command[0]", "relative", false},
				{"operations.b.command[0]", "empty", false},
			},
		},
		"restrictions": {
			config: `{"working_directory":"DIR"}`, policy: `{"allowed_commands":["/bin/sh"],"working_directory_restrictions":["/srv"]}`,
			want: []want{{"runner_config.working_directory", "is below none of", true}},
		},
		"environment": {
			config: `{"environment":{"LD_PRELOAD":"/x.so","A B":"x"}}`, policy: `{"allowed_commands":["/bin/sh"]}`,
			want: []want{{"runner_config.environment.A B", "not a variable's name", false}, {"runner_config.environment.LD_PRELOAD", "loads", false}},
		},
		"operations": {
			config: `{"working_directory":"DIR"}`, policy: `{"allowed_commands":["/bin/sh"]}`,
			operations: map[string]string{
				"both": `{"command":["/bin/sh"],"script":"run.py"}`, "escape": `{"script":"../x.sh"}`, "missing": `{"script":"nope.sh"}`,
				"run": `{}`, "ending": `{"script":"x.exe"}`, "ref": `{"command":["/bin/sh","$input.a["]}`, "none": `{}`, "empty": `{"command":[]}`, "python": `{"script":"run.py"}`,
				"bad": `{"command":["/bin/sh","$input.a[x]","$input.a[12"]}`,
			},
			want: []want{
				{"operations.both.script", "both", false},
				{"operations.escape.script", "below working_directory", false},
				{"operations.missing.script", "does not exist", true},
				{"operations.run", "no interpreter of .py", true},
				{"operations.ending.script", "does not exist", true},
				{"operations.ending.script", "no interpreter is known", false},
				{"operations.none", "no file named after", true},
				{"operations.empty.command", "", false},
				{"operations.python.script", "no interpreter of .py", true},
				{"operations.bad.command[2]", "not a position", false},
			},
		},
		"no working directory": {
			config: `{}`, policy: `{"allowed_commands":["/bin/sh"]}`, operations: map[string]string{"a": `{}`, "b": `{"script":"x.sh"}`},
			want: []want{{"operations.a", "no working_directory", false}, {"operations.b", "no working_directory", false}},
		},
		"enforced": {
			config: `{}`, policy: `{"allowed_commands":["/bin/sh"],"network_access":"localhost","file_access":"read"}`,
		},
		"one fault hides no other": {
			config: `{"environmnt":{},"working_directory":"work","environment":{"LD_PRELOAD":"x","A":{}},"timeout":"soon"}`,
			policy: `{"file_acess":"none","allowed_commands":["python3",7,"/bin/sh"],"network_access":5}`,
			operations: map[string]string{
				"a": `{"comand":["x"]}`, "b": `{"command":["/bin/sh","$input.a[12"],"scrpt":1}`, "c": `{"command":"ls -l"}`, "d": `{"command":["bin/x"],"timeout":1}`, "e": `{"script":7}`,
			},
			want: []want{
				{"runner_config.environmnt", "unknown key", false},
				{"runner_config.timeout", "", false},
				{"runner_config.environment.A", "", false},
				{"runner_config.working_directory", "relative", false},
				{"runner_config.environment.LD_PRELOAD", "loads", false},
				{"security_policy.file_acess", "unknown key", false},
				{"security_policy.network_access", "", false},
				{"security_policy.allowed_commands[0]", "not an absolute path", false},
				{"security_policy.allowed_commands[1]", "", false},
				{"operations.a.comand", "unknown key", false},
				{"operations.b.scrpt", "unknown key", false},
				{"operations.b.command[1]", "not a position", false},
				{"operations.c.command", "", false},
				{"operations.d.timeout", "unknown key", false},
				{"operations.d.command[0]", "relative", false},
				{"operations.e.script", "", false},
			},
		},
		"input in code": {
			config: `{}`, policy: `{"allowed_commands":["/bin/sh","/usr/bin/python3","/usr/bin/env"]}`,
			operations: map[string]string{
				"sh": `{"command":["/bin/sh","-ec","echo $input.text"]}`, "bare": `{"command":["sh","-c","$input.text"]}`, "py": `{"command":["python3","-I","-c","print('$input.text')","x"]}`,
				"env":  `{"command":["/usr/bin/env","sh","-c","$input.text"]}`,
				"good": `{"command":["/bin/sh","-c","echo \"$1\"","good","$input.text"]}`, "escaped": `{"command":["/bin/sh","-c","echo $$input.text"]}`, "script": `{"command":["/bin/sh","x.sh","-c","$input.text"]}`,
			},
			want: []want{
				{"operations.sh.command[2]", "into code", false},
				{"operations.bare.command[2]", "into code", false},
				{"operations.py.command[3]", "into code", false},
				{"operations.env.command[3]", "into code", false},
			},
		},
		"not objects": {
			config: `[]`, policy: `"x"`, operations: map[string]string{"a": `7`},
			want: []want{{"runner_config", "", false}, {"operations.a", "", false}, {"security_policy", "", false}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &runner.Service{
				Name: "s", ExecutionType: Type, Config: []byte(strings.ReplaceAll(tt.config, "DIR", dir)), Policy: []byte(tt.policy),
			}
			for name, config := range tt.operations {
				s.Operations = append(s.Operations, runner.Operation{Name: name, Config: []byte(config)})
			}
			problems, err := r.Validate(t.Context(), s)
			require.NoError(t, err)
			rest := problems
			for _, w := range tt.want {
				at := -1
				for i, p := range rest {
					if p.Path == w.path && strings.Contains(p.Message, w.text) && p.Warning == w.warning {
						at = i
					}
				}
				require.GreaterOrEqual(t, at, 0, "%v is not among %+v", w, rest)
				rest = append(append([]runner.Problem{}, rest[:at]...), rest[at+1:]...)
			}
			require.Empty(t, rest, "nothing else")
		})
	}
}

func TestFileAccessThatIsNotEnforced(t *testing.T) {
	s := &runner.Service{Policy: []byte(`{"allowed_commands":["/bin/sh"],"file_access":"read"}`)}
	for _, without := range [][]string{{sandbox.UserNamespace}, {sandbox.Landlock}, {sandbox.Seccomp}} {
		problems, err := newRunner(t, Options{without: without}).Validate(t.Context(), s)
		require.NoError(t, err)
		require.Empty(t, problems, "either holds files")
	}
	problems, err := newRunner(t, Options{without: []string{sandbox.UserNamespace, sandbox.Landlock}}).Validate(t.Context(), s)
	require.NoError(t, err)
	require.Len(t, problems, 1)
	require.Equal(t, "security_policy.file_access", problems[0].Path)
	require.Contains(t, problems[0].Message, "not enforced")
}

func TestRequiredIsolation(t *testing.T) {
	temp := t.TempDir()
	_, err := New(Options{TempDir: temp, RequireIsolation: []string{"sekkomp"}})
	require.ErrorContains(t, err, `"sekkomp" is not known`)
	require.ErrorContains(t, err, "landlock, seccomp")
	_, err = New(Options{TempDir: temp, RequireIsolation: []string{"cgroup", "seccomp", "landlock"}, without: []string{sandbox.Landlock}})
	require.ErrorContains(t, err, "lacks landlock (")
	_, err = New(Options{TempDir: temp, RequireIsolation: []string{"all"}, without: []string{sandbox.UserNamespace}})
	for _, name := range []string{sandbox.UserNamespace, sandbox.MountNamespace, sandbox.PIDNamespace, sandbox.OwnUID, "disk_quota"} {
		require.ErrorContains(t, err, name)
	}
	require.NotContains(t, err.Error(), sandbox.Seccomp)
	newRunner(t, Options{RequireIsolation: []string{"seccomp", "landlock", "user_namespace"}})
	if os.Getuid() == 0 {
		newRunner(t, Options{RequireIsolation: []string{"all"}})
	}
}

func TestDescribe(t *testing.T) {
	r := newRunner(t, Options{})
	d, err := r.Describe(t.Context())
	require.NoError(t, err)
	features := map[string]runner.Feature{}
	for _, f := range d.Isolation {
		features[f.Name] = f
		require.True(t, f.Available || f.Detail != "", "%s says why", f.Name)
	}
	require.True(t, features["process_group"].Available)
	for _, name := range []string{sandbox.Landlock, sandbox.Seccomp, sandbox.UserNamespace, sandbox.MountNamespace, sandbox.PIDNamespace, "disk_quota"} {
		require.True(t, features[name].Available, features[name].Detail)
	}
	bare, err := newRunner(t, Options{without: []string{sandbox.UserNamespace, sandbox.Landlock, sandbox.Seccomp}}).Describe(t.Context())
	require.NoError(t, err)
	for _, f := range bare.Isolation {
		require.True(t, f.Available || f.Detail != "", "%s says why", f.Name)
		if f.Available {
			require.Contains(t, []string{"process_group", "private_tmp", "rlimit", "cgroup", "no_new_privileges", "capabilities_dropped", "network_namespace"}, f.Name,
				"nothing is claimed that is not done")
		}
	}
	if os.Getuid() == 0 {
		require.True(t, features["cgroup"].Available, features["cgroup"].Detail)
	}
	require.True(t, features["capabilities_dropped"].Available)
	require.Len(t, d.Types, 1)
	require.Zero(t, d.Types[0].DefaultMaxRetries, "work may not bear repeating")
}

func TestValidateLocalhost(t *testing.T) {
	r := newRunner(t, Options{})
	s := &runner.Service{Policy: []byte(`{"allowed_commands":["/bin/sh"],"network_access":"localhost"}`)}
	if r.noLoop == nil {
		problems, err := r.Validate(t.Context(), s)
		require.NoError(t, err)
		require.Empty(t, problems)
	}
	r.noLoop = errors.New("the test says so")
	problems, err := r.Validate(t.Context(), s)
	require.NoError(t, err)
	require.Len(t, problems, 1)
	require.Contains(t, problems[0].Message, "refused on this machine: the test says so")
}

func TestNewNeedsItsDirectory(t *testing.T) {
	_, err := New(Options{TempDir: filepath.Join(t.TempDir(), "nope")})
	require.ErrorContains(t, err, "directory for jobs")
}

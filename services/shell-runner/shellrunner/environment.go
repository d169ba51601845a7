package shellrunner

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.opentelemetry.io/otel/propagation"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// defaultPath is the PATH of a command whose environment gives none.
	defaultPath = "/usr/bin:/bin"
	// maxString is what the kernel takes in one argument or variable, its end included.
	maxString = 128 << 10
	// maxVector bounds all arguments and variables together, below the kernel's own bound.
	maxVector = 1 << 20
)

// loaderVariables change which code runs inside an allowed command.
var loaderVariables = []string{
	"BASH_ENV", "BASHOPTS", "ENV", "GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH", "PERL5DB", "PERL5OPT", "PS4", "RUBYOPT", "SHELLOPTS",
}

// checkVariable says what is wrong with a variable of the environment; empty if nothing is.
func checkVariable(name, value string) (message, mend string) {
	valid := name != "" && (name[0] < '0' || name[0] > '9')
	for i := range len(name) {
		valid = valid && isName(name[i])
	}
	switch {
	case !valid:
		return "is not a variable's name", "use letters, digits and underscores, with no digit first"
	case strings.HasPrefix(name, "LD_") || strings.HasPrefix(name, "DYLD_") || slices.Contains(loaderVariables, name):
		return "changes which code an allowed command loads, so that allowed_commands would not hold", "remove it"
	case strings.HasPrefix(name, "SPECQL_") || name == "TRACEPARENT":
		return "is set by the runner itself", "choose another name"
	case strings.ContainsRune(value, 0):
		return "holds a NUL character", "remove the character"
	case len(name)+len(value)+2 > maxString:
		return fmt.Sprintf("is %d KiB long; the kernel takes at most 128 KiB in one variable", (len(name)+len(value))>>10), "put the value into a file"
	}
	return "", ""
}

// environment is the whole environment of a job's command.
func environment(ctx context.Context, cfg Config, job *runner.Job, input json.RawMessage, private string) ([]string, error) {
	env := map[string]string{"PATH": defaultPath, "HOME": private, "TMPDIR": private}
	for name, scalar := range cfg.Environment {
		value := string(scalar)
		if message, mend := checkVariable(name, value); message != "" {
			return nil, fault.New(fault.Validation, "runner_config.environment.%s %s; %s", clip(name), message, mend)
		}
		env[name] = value
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	for name, value := range map[string]string{
		"SPECQL_JOB_ID": job.ID, "SPECQL_RUN_ID": job.RunID, "SPECQL_IDEMPOTENCY_KEY": job.IdempotencyKey,
		"TRACEPARENT": carrier.Get("traceparent"),
	} {
		if value != "" && !strings.ContainsRune(value, 0) && len(value) < 4<<10 {
			env[name] = value
		}
	}
	if len("SPECQL_INPUT=")+len(input)+1 <= maxString {
		env["SPECQL_INPUT"] = string(input)
	} else {
		env["SPECQL_INPUT_TOO_LARGE"] = "1" // stdin has it
	}
	vector := make([]string, 0, len(env))
	for _, name := range slices.Sorted(maps.Keys(env)) {
		vector = append(vector, name+"="+env[name])
	}
	return vector, nil
}

// checkSizes refuses what execve would refuse with less to say.
func checkSizes(argv, env []string) error {
	total := 0
	for i, arg := range argv {
		if len(arg)+1 > maxString {
			return fault.New(fault.Validation, "command[%d] is %d KiB long; the kernel takes at most 128 KiB in one argument: read the value from stdin", i, len(arg)>>10)
		}
		total += len(arg) + 9
	}
	for _, v := range env {
		total += len(v) + 9
	}
	if total > maxVector {
		return fault.New(fault.Validation, "arguments and environment are %d KiB long together; at most %d KiB fit: read the values from stdin", total>>10, maxVector>>10)
	}
	return nil
}

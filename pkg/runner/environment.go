package runner

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// variableName is what is shown of what a *_env_var key holds: anything else may be the secret itself.
var variableName = regexp.MustCompile(`^[A-Z_][A-Z0-9_]{0,127}$`)

// unset warns of the variables that the *_env_var keys of a service's configuration name and that are not set in this process,
// which nobody else can tell. Of a key that something was found at it says nothing: the variable may be one that the
// service is not to name.
func unset(config json.RawMessage, found []Problem) []Problem {
	var tree any
	if json.Unmarshal(config, &tree) != nil {
		return nil
	}
	var out []Problem
	var look func(path string, v any)
	look = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, key := range slices.Sorted(maps.Keys(v)) {
				at := path + "." + key
				name, text := v[key].(string)
				if !text || !strings.HasSuffix(key, "_env_var") {
					look(at, v[key])
					continue
				}
				if name == "" || OwnVariable(name) || os.Getenv(name) != "" || slices.ContainsFunc(found, func(p Problem) bool { return p.Path == at }) {
					continue
				}
				if !variableName.MatchString(name) {
					name = "that it names"
				}
				out = append(out, Problem{
					Path: at, Warning: true, Message: fmt.Sprintf("the variable %s is not set in the runner's environment, or empty: calls that need it fail", name),
					Mend: "set it where the runner starts, and start the runner anew",
				})
			}
		case []any:
			for i, e := range v {
				look(fmt.Sprintf("%s[%d]", path, i), e)
			}
		}
	}
	look("runner_config", tree)
	return out
}

package runner

import (
	"fmt"
	"slices"
	"strings"
)

// RequireAll stands for every feature in [Require].
const RequireAll = "all"

// Require says which of the isolation features that the operator insists on (--require-isolation) are
// missing, or not known; names may hold [RequireAll].
func Require(features []Feature, names []string) error {
	for _, name := range names {
		if name != RequireAll && !slices.ContainsFunc(features, func(f Feature) bool { return f.Name == name }) {
			var known []string
			for _, f := range features {
				known = append(known, f.Name)
			}
			return fmt.Errorf("--require-isolation: %q is not known; write all, or some of %s", clip(name), strings.Join(known, ", "))
		}
	}
	var missing []string
	for _, f := range features {
		if !f.Available && (slices.Contains(names, f.Name) || slices.Contains(names, RequireAll)) {
			missing = append(missing, f.Name+" ("+f.Detail+")")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("--require-isolation: this machine lacks %s", strings.Join(missing, "; "))
	}
	return nil
}

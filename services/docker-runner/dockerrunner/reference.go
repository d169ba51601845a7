package dockerrunner

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// maxArgument is the kernel's bound of one argument or variable, its end included.
const maxArgument = 128<<10 - 1

// inputReference is a reference into the input; $$input is the text $input.
var inputReference = regexp.MustCompile(`\$?\$input\b((?:\.[A-Za-z0-9_]+|\[[0-9]{1,9}\])*)`)

var inputStep = regexp.MustCompile(`[A-Za-z0-9_]+`)

func escaped(ref string) bool { return strings.HasPrefix(ref, "$$") }

// refers says whether an argument is filled from the input.
func refers(arg string) bool {
	return slices.ContainsFunc(inputReference.FindAllString(arg, -1), func(ref string) bool { return !escaped(ref) })
}

// inputInCode gives the positions in args of what an interpreter would run as code and what a
// caller's input gets into. written are the arguments as they are configured, args as they
// would be run; entrypoint comes before them.
func inputInCode(entrypoint, written, args []string) []int {
	var found []int
	look := func(before []string) {
		for _, i := range runner.CodeArguments(slices.Concat(before, args)) {
			if i -= len(before); i >= 0 && refers(written[i]) {
				found = append(found, i)
			}
		}
	}
	look(entrypoint)
	if len(entrypoint) > 0 {
		look(nil) // an entrypoint script commonly runs its arguments
	}
	slices.Sort(found)
	return slices.Compact(found)
}

const (
	inputInCodeText = "the input would be run as code there"
	inputInCodeMend = `pass it as a further argument: "$1" in a shell, sys.argv[1] in Python; or read stdin`
)

// fillArguments replaces each $input.field[0] in the arguments by what the input holds
// there: text as it is, everything else as JSON. The arguments never see a shell.
func fillArguments(args []string, input json.RawMessage) ([]string, error) {
	if !slices.ContainsFunc(args, func(a string) bool { return strings.Contains(a, "$input") }) {
		return args, nil
	}
	var root any
	d := json.NewDecoder(bytes.NewReader(input))
	d.UseNumber()
	if err := d.Decode(&root); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the input is not valid JSON")
	}
	filled := make([]string, len(args))
	for i, arg := range args {
		var failed error
		filled[i] = inputReference.ReplaceAllStringFunc(arg, func(ref string) string {
			if escaped(ref) {
				return ref[1:]
			}
			value, err := lookUp(root, ref)
			if err != nil {
				failed = err
				return ""
			}
			return argumentText(value)
		})
		switch {
		case failed != nil:
			return nil, failed
		case strings.ContainsRune(filled[i], 0):
			return nil, fault.New(fault.Validation, "argument %d (%s) would hold a NUL byte", i, clip(arg))
		case len(filled[i]) > maxArgument:
			return nil, fault.New(fault.Validation, "argument %d (%s) would be %d bytes long, more than the %d that an argument may have; read it from stdin instead", i, clip(arg), len(filled[i]), maxArgument)
		}
	}
	return filled, nil
}

func lookUp(value any, ref string) (any, error) {
	at := "$input"
	for _, step := range inputStep.FindAllString(strings.TrimPrefix(ref, "$input"), -1) {
		if list, ok := value.([]any); ok {
			n, err := strconv.Atoi(step)
			if err != nil || n >= len(list) {
				return nil, fault.New(fault.Validation, "%s: %s is a list of %d items and has no %s", ref, at, len(list), step)
			}
			value, at = list[n], at+"["+step+"]"
			continue
		}
		object, ok := value.(map[string]any)
		if !ok {
			return nil, fault.New(fault.Validation, "%s: %s has no fields", ref, at)
		}
		next, ok := object[step]
		if !ok {
			names := slices.Sorted(maps.Keys(object))
			if len(names) > 20 {
				names = append(names[:20], "…")
			}
			return nil, fault.New(fault.Validation, "%s: %s has no field %q; it has: %s", ref, at, step, clip(strings.Join(names, ", ")))
		}
		value, at = next, at+"."+step
	}
	return value, nil
}

func argumentText(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	default:
		raw, err := json.Marshal(v)
		if err != nil { // it came from JSON
			return fmt.Sprint(v)
		}
		return string(raw)
	}
}

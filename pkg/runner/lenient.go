package runner

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
)

// Lenient decodes what fits and leaves out what does not: unknown keys, and values of another
// type. [CheckService] reports those; Lenient lets the checks that follow see the rest, so
// that every problem is reported at once. [AppendProblems] keeps the two from saying the
// same thing twice.
func Lenient[T any](raw json.RawMessage) T {
	var v T
	if len(bytes.TrimSpace(raw)) == 0 {
		return v
	}
	if json.Unmarshal(raw, &v) == nil {
		return v
	}
	// A type with a decoder of its own ends the decoding where it fails, so what does not
	// fit is taken out first.
	var fits T
	whole, err := decodeAny(raw)
	if err != nil {
		return fits
	}
	for _, f := range checkJSON(SchemaOf[T](), raw, "") {
		if f.structural {
			whole = without(whole, f.location)
		}
	}
	if raw, err = json.Marshal(whole); err == nil {
		// What still does not fit is left as it is; CheckService says what.
		_ = json.Unmarshal(raw, &fits)
	}
	return fits
}

// without takes the value at a place out of a JSON value. An item of a list becomes null, so
// that the others keep their positions.
func without(v any, location []string) any {
	if len(location) == 0 {
		return nil
	}
	at, rest := location[0], location[1:]
	switch v := v.(type) {
	case map[string]any:
		if inner, ok := v[at]; ok {
			if v[at] = without(inner, rest); len(rest) == 0 {
				delete(v, at)
			}
		}
	case []any:
		if i, err := strconv.Atoi(at); err == nil && i >= 0 && i < len(v) {
			v[i] = without(v[i], rest)
		}
	}
	return v
}

// AppendProblems appends the problems of a later check to those of an earlier one, except
// those of a value that the earlier one found wrong already.
func AppendProblems(found []Problem, later ...Problem) []Problem {
	wrong := make(map[string]bool, len(found))
	for _, p := range found {
		if !p.Warning {
			wrong[p.Path] = true
		}
	}
	for _, p := range later {
		if !belowAny(p.Path, wrong) {
			found = append(found, p)
		}
	}
	return found
}

// belowAny says whether a path is one of these, or lies below one of them.
func belowAny(path string, of map[string]bool) bool {
	for path != "" {
		if of[path] {
			return true
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
	return false
}

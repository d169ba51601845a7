package spec

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// reader reads typed values out of nodes and says what is wrong with them.
type reader struct{ *collector }

// mapping checks that n is a mapping. An absent or null n is none, without a problem.
func (r reader) mapping(n *node, path string) bool {
	if n.isNull() {
		return false
	}
	if n.kind != mappingNode {
		r.errorf(n.pos, path, "", "must be a map, is %s", n.describe())
		return false
	}
	return true
}

// sequence checks that n is a list, as mapping does.
func (r reader) sequence(n *node, path string) bool {
	if n.isNull() {
		return false
	}
	if n.kind != sequenceNode {
		mend := ""
		if n.kind == mappingNode {
			mend = "write each item behind a `- `"
		}
		r.errorf(n.pos, path, mend, "must be a list, is %s", n.describe())
		return false
	}
	return true
}

// known reports the keys of n that are not among the ones allowed.
func (r reader) known(n *node, path string, allowed ...string) {
	for _, e := range n.entries {
		if !slices.Contains(allowed, e.key) {
			r.errorf(e.pos, keyPath(path, e.key), r.suggest(e.key, allowed), "unknown key %q", clip(e.key))
		}
	}
}

// missing reports that a key of n is not there.
func (r reader) missing(n *node, path, key, mend string) {
	r.errorf(n.pos, path, mend, "the key %q is missing", key)
}

// str reads a string. Numbers and booleans are not strings: what YAML makes of `no` or `1.10` is seldom what was meant.
func (r reader) str(n *node, path string) (string, bool) {
	if n.isNull() {
		if n != nil {
			r.errorf(n.pos, path, "give it a value or remove the key", "must be a string, is empty")
		}
		return "", false
	}
	s, ok := n.value.(string)
	if n.kind != scalarNode || !ok {
		mend := ""
		if n.kind == scalarNode {
			mend = "put it in quotes"
		}
		r.errorf(n.pos, path, mend, "must be a string, is %s", n.describe())
		return "", false
	}
	return s, true
}

// text reads a string that must not be blank.
func (r reader) text(n *node, path string) (string, bool) {
	s, ok := r.str(n, path)
	if ok && strings.TrimSpace(s) == "" {
		r.errorf(n.pos, path, "", "must not be empty")
		return "", false
	}
	return s, ok
}

// name reads a name of letters, digits, `_`, `-` and `.`.
func (r reader) name(n *node, path string) (string, bool) {
	s, ok := r.text(n, path)
	if !ok {
		return "", false
	}
	if problem := checkName(s); problem != "" {
		r.errorf(n.pos, path, "use letters, digits, `_`, `-` and `.`", "%s", problem)
		return s, false
	}
	return s, true
}

func checkName(s string) string {
	if len(s) > maxNameBytes {
		return fmt.Sprintf("a name may have %d bytes, this one has %d", maxNameBytes, len(s))
	}
	for i, c := range s {
		if c == '_' || unicode.IsLetter(c) || unicode.IsDigit(c) || i > 0 && (c == '-' || c == '.') {
			continue
		}
		return fmt.Sprintf("a name cannot hold %q", c)
	}
	return ""
}

// identifier reads a name that can be a root of references: letters, digits and `_`.
func (r reader) identifier(n *node, path string) (string, bool) {
	s, ok := r.text(n, path)
	if !ok {
		return "", false
	}
	if !isIdentifier(s) {
		r.errorf(n.pos, path, "use letters, digits and `_`, and no digit first", "%q cannot be used as a name", clip(s))
		return s, false
	}
	return s, true
}

func isIdentifier(s string) bool {
	for i, c := range []byte(s) {
		if c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || i > 0 && '0' <= c && c <= '9' {
			continue
		}
		return false
	}
	return s != "" && len(s) <= maxNameBytes
}

// number reads a number. A string that came out of a variable counts if it is one.
func (r reader) number(n *node, path string) (float64, bool) {
	if f, ok := n.number(); ok {
		return f, true
	}
	r.errorf(n.pos, path, "", "must be a number, is %s", n.describe())
	return 0, false
}

func (n *node) number() (float64, bool) {
	if n == nil || n.kind != scalarNode {
		return 0, false
	}
	switch v := n.value.(type) {
	case int64:
		return float64(v), true
	case float64:
		return v, true
	case string:
		f, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
		return f, n.env && err == nil && !math.IsNaN(f) && !math.IsInf(f, 0)
	}
	return 0, false
}

// integer reads a whole number between low and high.
func (r reader) integer(n *node, path string, low, high int) (int, bool) {
	f, ok := n.number()
	if !ok || f != math.Trunc(f) {
		r.errorf(n.pos, path, "", "must be a whole number, is %s", n.describe())
		return 0, false
	}
	if f < float64(low) || f > float64(high) {
		r.errorf(n.pos, path, "", "must be between %d and %d, is %v", low, high, f)
		return 0, false
	}
	return int(f), true
}

// maxSeconds bounds every time that a document sets: a year.
const maxSeconds = 366 * 24 * 3600

// seconds reads a time in seconds.
func (r reader) seconds(n *node, path string) (time.Duration, bool) {
	f, ok := n.number()
	if !ok {
		mend := "write the number of seconds, such as `30`"
		r.errorf(n.pos, path, mend, "must be a number of seconds, is %s", n.describe())
		return 0, false
	}
	if f <= 0 || f > maxSeconds {
		r.errorf(n.pos, path, "", "must be more than 0 and at most %d seconds, is %v", maxSeconds, f)
		return 0, false
	}
	return time.Duration(f * float64(time.Second)), true
}

// boolean reads true or false.
func (r reader) boolean(n *node, path string) (value, ok bool) {
	if n.kind == scalarNode {
		if b, isBool := n.value.(bool); isBool {
			return b, true
		}
		if s, isString := n.value.(string); isString && n.env {
			if b, err := strconv.ParseBool(s); err == nil {
				return b, true
			}
		}
	}
	r.errorf(n.pos, path, "write true or false", "must be true or false, is %s", n.describe())
	return false, false
}

// describeValue names the kind of a scalar or a value of JSON.
func describeValue(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return "a boolean"
	case string:
		if utf8.RuneCountInString(v) == 0 {
			return "an empty string"
		}
		return "a string"
	case []any:
		return "a list"
	case map[string]any:
		return "an object"
	default:
		return "a number"
	}
}

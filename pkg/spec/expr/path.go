package expr

import (
	"fmt"
	"strconv"
	"strings"
)

// segment is one step of a path: a field of an object, or an index of a list.
type segment struct {
	field   string
	index   int
	isIndex bool
}

func isNameStart(c byte) bool {
	return c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

func isNamePart(c byte) bool { return isNameStart(c) || '0' <= c && c <= '9' }

// scanName returns the end of the name that starts at i, or i if none does.
func scanName(s string, i int) int {
	if i >= len(s) || !isNameStart(s[i]) {
		return i
	}
	for i < len(s) && isNamePart(s[i]) {
		i++
	}
	return i
}

// scanReference reads `$name.path[0]["key"]` at s[i], which must be a `$` with a name behind it. It returns
// the end of the reference; what does not continue the path is left to the caller.
func scanReference(s string, i int) (root string, path []segment, end int) {
	start := i + 1
	i = scanName(s, start)
	root = s[start:i]
	for i < len(s) {
		switch s[i] {
		case '.':
			next := scanName(s, i+1)
			if next == i+1 {
				return root, path, i
			}
			path = append(path, segment{field: s[i+1 : next]})
			i = next
		case '[':
			seg, next, ok := scanIndex(s, i)
			if !ok {
				return root, path, i
			}
			path = append(path, seg)
			i = next
		default:
			return root, path, i
		}
	}
	return root, path, i
}

// scanIndex reads `[12]` or `["key"]` at s[i].
func scanIndex(s string, i int) (segment, int, bool) {
	i++
	if i >= len(s) {
		return segment{}, 0, false
	}
	if quote := s[i]; quote == '"' || quote == '\'' {
		end := strings.IndexByte(s[i+1:], quote)
		if end < 0 || i+1+end+1 >= len(s) || s[i+1+end+1] != ']' {
			return segment{}, 0, false
		}
		return segment{field: s[i+1 : i+1+end]}, i + 1 + end + 2, true
	}
	start := i
	for i < len(s) && '0' <= s[i] && s[i] <= '9' && i-start < 9 {
		i++
	}
	if i == start || i >= len(s) || s[i] != ']' {
		return segment{}, 0, false
	}
	n, err := strconv.Atoi(s[start:i])
	if err != nil {
		return segment{}, 0, false
	}
	return segment{index: n, isIndex: true}, i + 1, true
}

// joinField appends a field to a path as messages and Ref.Path write it.
func joinField(path, field string) string {
	if field == "" || scanName(field, 0) != len(field) {
		return path + "[" + strconv.Quote(field) + "]"
	}
	if path == "" {
		return field
	}
	return path + "." + field
}

func joinIndex(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func formatPath(path []segment) string {
	out := ""
	for _, seg := range path {
		if seg.isIndex {
			out = joinIndex(out, seg.index)
		} else {
			out = joinField(out, seg.field)
		}
	}
	return out
}

func formatReference(root string, path []segment) string {
	p := formatPath(path)
	if p == "" || p[0] == '[' {
		return "$" + root + p
	}
	return "$" + root + "." + p
}

// follow walks a path through a value. The error says where the walk ended and what there is.
func follow(root string, v any, path []segment) (any, *Error) {
	for i, seg := range path {
		here := func() string { return formatReference(root, path[:i]) }
		if seg.isIndex {
			list, ok := v.([]any)
			if !ok {
				return nil, &Error{Message: fmt.Sprintf("%s is %s, not a list", here(), describe(v))}
			}
			if seg.index >= len(list) {
				return nil, &Error{Message: fmt.Sprintf("%s has %d items, there is no [%d]", here(), len(list), seg.index)}
			}
			v = list[seg.index]
			continue
		}
		object, ok := v.(map[string]any)
		if !ok {
			return nil, &Error{Message: fmt.Sprintf("%s is %s, it has no field %q", here(), describe(v), clip(seg.field, 64))}
		}
		next, ok := object[seg.field]
		if !ok {
			names := make([]string, 0, len(object))
			for name := range object {
				names = append(names, name)
			}
			return nil, &Error{Message: fmt.Sprintf("%s has no field %q; the fields there are: %s", here(), clip(seg.field, 64), listNames(names))}
		}
		v = next
	}
	return v, nil
}

// resolve looks a reference up in a scope.
func resolve(s Scope, root string, bare bool, path []segment) (any, *Error) {
	v, ok := lookup(s, root, bare)
	if !ok {
		name := "$" + root
		if bare {
			name = root
		}
		return nil, &Error{Message: fmt.Sprintf("nothing is named %s here; the names there are: %s", name, listNames(s.Roots()))}
	}
	return follow(root, v, path)
}

func lookup(s Scope, root string, bare bool) (any, bool) {
	if bare {
		if b, ok := s.(BareScope); ok {
			return b.LookupBare(root)
		}
	}
	return s.Lookup(root)
}

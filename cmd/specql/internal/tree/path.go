package tree

import (
	"strconv"
	"strings"
)

// iteration is the name of a foreach's iterations in a path, such as steps[4].items[2].do[0].
const iteration = "items"

// segment is one part of a step's path: name[index].
type segment struct {
	name  string
	index int
}

func (s segment) iteration() bool { return s.name == iteration }

// parse splits a step path such as steps[4].items[2].do[0]. A path that is not one is a single segment.
func parse(path string) []segment {
	var out []segment
	for part := range strings.SplitSeq(path, ".") {
		name, rest, ok := strings.Cut(part, "[")
		index, err := strconv.Atoi(strings.TrimSuffix(rest, "]"))
		if !ok || err != nil || index < 0 {
			return []segment{{name: path, index: -1}}
		}
		out = append(out, segment{name: name, index: index})
	}
	return out
}

// rank orders the sections below one step as the document does.
func (s segment) rank() int {
	switch s.name {
	case "on_success", "then", "do", "branches", iteration:
		return 1
	case "on_failure", "else":
		return 2
	}
	return 0
}

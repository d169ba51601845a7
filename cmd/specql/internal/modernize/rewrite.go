package modernize

import (
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/specql/mesh/pkg/spec"
)

// edit inserts one key into a document.
type edit struct {
	// path of the key that is new.
	path []any
	// wasNull says that the map it is put into was written as nothing.
	wasNull bool
	// line is where it goes, counted from 1: behind the line, before it and the comments above it if before is set, or at
	// the column if that is not 0.
	line, column int
	before       bool
	// lines are new lines; at a column there is one, a part of a line.
	lines []string
	// says is the key with its value, for people.
	says string
}

// Says is what [Rewrite] writes, such as `execution_type: http`; empty where it can write nothing.
func (f *Finding) Says() string {
	if f.edit == nil {
		return ""
	}
	return f.edit.says
}

// insertKey gives a service one more key, behind the first of some keys whose value is on their line; nil if it cannot.
func insertKey(n *yaml.Node, path []any, key, text string, behind ...string) *edit {
	e := &edit{path: join(path, key), says: key + ": " + text}
	if flow(n) {
		return e.at(n, key+": "+text)
	}
	line := lineBehind(n, behind...)
	if line == 0 {
		return nil
	}
	e.line, e.lines = line, []string{indent(n.Column) + key + ": " + text}
	return e
}

// insertInto gives a block of a service, such as runner_config, one more key, and makes the block if there is none; nil
// if it cannot.
func insertInto(n *yaml.Node, path []any, block, key, text string) *edit {
	k := keyNode(n, block)
	if k == nil {
		return insertBlock(n, path, block, key, text)
	}
	v := n.Content[slices.Index(n.Content, k)+1]
	e := &edit{path: join(path, block, key), says: key + ": " + text}
	switch {
	case v.Kind == yaml.MappingNode && flow(v):
		return e.at(v, key+": "+text)
	case v.Kind == yaml.MappingNode && len(v.Content) > 0 && v.Content[0].Line > k.Line:
		e.line, e.lines = k.Line, []string{indent(v.Content[0].Column) + e.says}
	case v.Kind == yaml.ScalarNode && v.ShortTag() == "!!null" && v.Value == "" && !flow(n):
		e.line, e.lines, e.wasNull = k.Line, []string{indent(k.Column+2) + e.says}, true
	default:
		return nil // an alias, which others share, or something else
	}
	return e
}

func insertBlock(n *yaml.Node, path []any, block, key, text string) *edit {
	if value(n, block) != nil {
		return nil // merged: a block here would take its place
	}
	e := &edit{path: join(path, block), says: block + ": {" + key + ": " + text + "}"}
	if flow(n) {
		return e.at(n, e.says)
	}
	e.lines = []string{indent(n.Column) + block + ":", indent(n.Column+2) + key + ": " + text}
	if config := keyNode(n, "runner_config"); config != nil {
		if next := slices.Index(n.Content, config) + 2; next < len(n.Content) {
			e.line, e.before = n.Content[next].Line, true
			return e
		}
	}
	e.line = lineBehind(n, "execution_type", "category", "type", "name")
	if e.line == 0 {
		return nil
	}
	return e
}

// at makes it an insertion into a map that is written in braces.
func (e *edit) at(n *yaml.Node, text string) *edit {
	if len(n.Content) == 0 {
		e.line, e.column, e.lines = n.Line, n.Column+1, []string{text}
		return e
	}
	// The name stays first.
	first := n.Content[0]
	if first.Value == "name" && len(n.Content) > 2 {
		first = n.Content[2]
	}
	e.line, e.column, e.lines = first.Line, first.Column, []string{text + ", "}
	return e
}

// lineBehind is the line of the first of some keys that a map has with a value on the same line; 0 for none.
func lineBehind(n *yaml.Node, keys ...string) int {
	for _, key := range keys {
		k := keyNode(n, key)
		if k == nil {
			continue
		}
		v := n.Content[slices.Index(n.Content, k)+1]
		if v.Kind == yaml.ScalarNode && v.Line == k.Line && v.Style&(yaml.LiteralStyle|yaml.FoldedStyle) == 0 {
			return k.Line
		}
	}
	return 0
}

func flow(n *yaml.Node) bool { return n.Style&yaml.FlowStyle != 0 }

func indent(column int) string { return strings.Repeat(" ", max(column-1, 0)) }

// Rewrite writes modern forms into a registry and gives its new content. It marks what it wrote. A form is left out if
// the document would then say anything else than before besides the new key, or if same, which is given the whole new
// content, does not agree.
func Rewrite(f spec.File, found []Finding, same func(content []byte) (bool, error)) ([]byte, error) {
	try := func(edits []*edit) ([]byte, bool, error) {
		content := insert(f.Content, edits)
		if !onlyAdds(f.Content, content, edits) {
			return nil, false, nil
		}
		ok, err := same(content)
		return content, ok, err
	}
	var all []*edit
	for _, x := range found {
		if x.edit != nil {
			all = append(all, x.edit)
		}
	}
	if len(all) == 0 {
		return f.Content, nil
	}
	content, ok, err := try(all)
	if err != nil {
		return nil, err
	}
	taken := all
	if !ok {
		if content, taken, err = oneByOne(f.Content, all, try); err != nil {
			return nil, err
		}
	}
	for i := range found {
		found[i].Written = found[i].edit != nil && slices.Contains(taken, found[i].edit)
	}
	return content, nil
}

// oneByOne takes what can be taken. A second pass takes what needed a later one.
func oneByOne(content []byte, all []*edit, try func([]*edit) ([]byte, bool, error)) ([]byte, []*edit, error) {
	var taken []*edit
	for range 2 {
		for _, e := range all {
			if slices.Contains(taken, e) {
				continue
			}
			changed, ok, err := try(append(slices.Clone(taken), e))
			if err != nil {
				return nil, nil, err
			}
			if ok {
				content, taken = changed, append(taken, e)
			}
		}
	}
	return content, taken, nil
}

// insert makes the edits in the text.
func insert(content []byte, edits []*edit) []byte {
	end := "\n"
	if strings.Contains(string(content), "\r\n") {
		end = "\r\n"
	}
	lines := strings.SplitAfter(string(content), "\n")
	behind := map[int][]string{}
	inside := map[int][]*edit{}
	for _, e := range edits {
		switch {
		case e.column > 0:
			inside[e.line] = append(inside[e.line], e)
		case e.before:
			line := e.line - 1
			for line > 0 && line <= len(lines) && isComment(lines[line-1]) {
				line--
			}
			behind[line] = append(behind[line], e.lines...)
		default:
			behind[e.line] = append(behind[e.line], e.lines...)
		}
	}
	var out strings.Builder
	for i, line := range lines {
		here := inside[i+1]
		// From the end, so that columns stay; of the same column the first edit ends up first.
		slices.SortStableFunc(here, func(a, b *edit) int { return a.column - b.column })
		slices.Reverse(here)
		for _, e := range here {
			runes := []rune(line)
			if at := e.column - 1; at <= len(runes) {
				line = string(runes[:at]) + e.lines[0] + string(runes[at:])
			}
		}
		out.WriteString(line)
		for _, text := range behind[i+1] {
			if i == len(lines)-1 {
				text = end + text
			} else {
				text += end
			}
			out.WriteString(text)
		}
	}
	return []byte(out.String())
}

func isComment(line string) bool {
	line = strings.TrimSpace(line)
	return line == "" || strings.HasPrefix(line, "#")
}

// onlyAdds says whether a document says what another one does, and has the keys of the edits besides.
func onlyAdds(before, after []byte, edits []*edit) bool {
	var was, is any
	if yaml.Load(before, &was) != nil || yaml.Load(after, &is) != nil {
		return false
	}
	for _, e := range edits {
		if !e.remove(is) {
			return false
		}
	}
	return reflect.DeepEqual(was, is)
}

// remove takes the new key out of a decoded document, and says whether it was there.
func (e *edit) remove(document any) bool {
	var parent any
	here := document
	for _, p := range e.path[:len(e.path)-1] {
		parent = here
		switch p := p.(type) {
		case int:
			list, _ := here.([]any)
			if p >= len(list) {
				return false
			}
			here = list[p]
		case string:
			m, _ := here.(map[string]any)
			here = m[p]
		}
	}
	m, _ := here.(map[string]any)
	key, _ := e.path[len(e.path)-1].(string)
	if _, there := m[key]; !there {
		return false
	}
	delete(m, key)
	if block, _ := e.path[len(e.path)-2].(string); e.wasNull {
		outer, _ := parent.(map[string]any)
		if outer == nil {
			return false
		}
		outer[block] = nil
	}
	return true
}

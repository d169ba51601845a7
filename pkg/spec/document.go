package spec

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"
)

type nodeKind int

const (
	scalarNode nodeKind = iota
	mappingNode
	sequenceNode
)

// node is a value of a document with its place. Aliases and merge keys are already resolved, so a node may be reached
// over more than one path; it is never changed after loading.
type node struct {
	kind    nodeKind
	pos     Position
	value   any // of a scalar: string, int64, float64, bool or nil
	entries []entry
	items   []*node
	env     bool // a scalar into which a variable was put
}

// entry is a key of a mapping with its value.
type entry struct {
	key   string
	pos   Position // of the key
	value *node
}

func (n *node) get(key string) *node {
	if e := n.entry(key); e != nil {
		return e.value
	}
	return nil
}

func (n *node) entry(key string) *entry {
	if n == nil {
		return nil
	}
	for i := range n.entries {
		if n.entries[i].key == key {
			return &n.entries[i]
		}
	}
	return nil
}

func (n *node) isNull() bool { return n == nil || n.kind == scalarNode && n.value == nil }

// native gives the value as JSON has it, made anew.
func (n *node) native() any {
	if n == nil {
		return nil
	}
	switch n.kind {
	case mappingNode:
		out := make(map[string]any, len(n.entries))
		for _, e := range n.entries {
			out[e.key] = e.value.native()
		}
		return out
	case sequenceNode:
		out := make([]any, len(n.items))
		for i, item := range n.items {
			out[i] = item.native()
		}
		return out
	default:
		return n.value
	}
}

// describe names the kind of a value in messages, without the value.
func (n *node) describe() string {
	if n == nil {
		return "nothing"
	}
	switch n.kind {
	case mappingNode:
		return "a map"
	case sequenceNode:
		return "a list"
	default:
		return describeValue(n.value)
	}
}

// loader turns YAML into nodes.
type loader struct {
	*collector
	file    string
	nodes   int
	aliased int
	stopped bool   // a bound is exceeded; said once
	join    string // a top-level key whose lists are joined where it is repeated
}

// load reads the one document of a file. It returns nil, next to a problem, if there is nothing to go on with.
func load(f File, c *collector) *node { return loadJoining(f, c, "") }

// loadJoining is load for documents in which a top-level key may be repeated, its lists joined.
func loadJoining(f File, c *collector, join string) *node {
	l := &loader{collector: c, file: f.Name, join: join}
	start := Position{File: f.Name, Line: 1, Column: 1}
	if len(f.Content) > MaxFileBytes {
		c.errorf(start, "", "split it", "the file has %d bytes, the limit is %d", len(f.Content), MaxFileBytes)
		return nil
	}
	if !utf8.Valid(f.Content) {
		c.errorf(l.invalidUTF8(f.Content), "", "save it as UTF-8", "the file is not valid UTF-8")
		return nil
	}
	root, err := decode(f.Content)
	if err != nil {
		c.errorf(l.errorPosition(err), "", yamlMend(err, f.Content), "%s", yamlMessage(err))
		return nil
	}
	if root == nil {
		c.errorf(start, "", "", "the file is empty")
		return nil
	}
	n := l.convert(root, "", 0, nil)
	if l.stopped || n.isNull() {
		if !l.stopped {
			c.errorf(start, "", "", "the file is empty")
		}
		return nil
	}
	return n
}

var errSecondDocument = errors.New("the file holds more than one YAML document")

// decode parses YAML. The library has been fuzzed, but a panic in it must not take a server down with it.
func decode(content []byte) (root *yaml.Node, err error) {
	defer func() {
		if r := recover(); r != nil {
			root, err = nil, fmt.Errorf("the YAML parser failed: %v", r)
		}
	}()
	loader, err := yaml.NewLoader(bytes.NewReader(content), yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(MaxDepth))))
	if err != nil {
		return nil, err
	}
	var document yaml.Node
	if err := loader.Load(&document); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var second yaml.Node
	if err := loader.Load(&second); !errors.Is(err, io.EOF) {
		if err == nil {
			err = &placedError{error: errSecondDocument, line: second.Line, column: second.Column}
		}
		return nil, err
	}
	if document.Kind == yaml.DocumentNode {
		if len(document.Content) == 0 {
			return nil, nil
		}
		return document.Content[0], nil
	}
	return &document, nil
}

type placedError struct {
	error
	line, column int
}

func (e *placedError) Unwrap() error { return e.error }

func (l *loader) errorPosition(err error) Position {
	p := Position{File: l.file, Line: 1, Column: 1}
	if placed, ok := errors.AsType[*placedError](err); ok {
		p.Line, p.Column = placed.line, placed.column
	}
	if failed, ok := errors.AsType[*yaml.LoadError](err); ok && failed.Mark.Line > 0 {
		p.Line, p.Column = failed.Mark.Line, max(1, failed.Mark.Column)
	}
	return p
}

func yamlMessage(err error) string {
	failed, ok := errors.AsType[*yaml.LoadError](err)
	if !ok {
		return err.Error()
	}
	message := failed.Message
	if message == "" {
		message = err.Error()
	}
	if failed.ContextMsg != "" {
		message = failed.ContextMsg + ": " + message
	}
	return "this is not YAML: " + message
}

func yamlMend(err error, content []byte) string {
	if errors.Is(err, errSecondDocument) {
		return "keep one document in each file"
	}
	failed, ok := errors.AsType[*yaml.LoadError](err)
	if !ok {
		return ""
	}
	lines := bytes.Split(content, []byte("\n"))
	if i := failed.Mark.Line - 1; i >= 0 && i < len(lines) {
		indent := lines[i][:len(lines[i])-len(bytes.TrimLeft(lines[i], " \t"))]
		if bytes.ContainsRune(indent, '\t') {
			return "indent with spaces, not with tabs"
		}
	}
	return "check the indentation and the quotes there and in the line before"
}

func (l *loader) invalidUTF8(content []byte) Position {
	p := Position{File: l.file, Line: 1, Column: 1}
	for len(content) > 0 {
		r, size := utf8.DecodeRune(content)
		switch {
		case r == utf8.RuneError && size == 1:
			return p
		case r == '\n':
			p.Line, p.Column = p.Line+1, 1
		default:
			p.Column++
		}
		content = content[size:]
	}
	return p
}

// convert makes a node; through holds the aliased nodes that it is inside of.
func (l *loader) convert(y *yaml.Node, path string, depth int, through []*yaml.Node) *node {
	pos := Position{File: l.file, Line: y.Line, Column: y.Column}
	if !l.count(pos, path, depth, len(through) > 0) {
		return &node{pos: pos}
	}
	switch y.Kind {
	case yaml.AliasNode:
		if slices.Contains(through, y.Alias) {
			l.errorf(pos, path, "", "the alias *%s holds itself", clip(y.Value))
			return &node{pos: pos}
		}
		if y.Alias == nil {
			return &node{pos: pos}
		}
		return l.convert(y.Alias, path, depth+1, append(slices.Clip(through), y.Alias))
	case yaml.MappingNode:
		return l.convertMapping(y, pos, path, depth, through)
	case yaml.SequenceNode:
		n := &node{kind: sequenceNode, pos: pos, items: make([]*node, 0, len(y.Content))}
		for i, item := range y.Content {
			n.items = append(n.items, l.convert(item, indexPath(path, i), depth+1, through))
		}
		return n
	default:
		return &node{pos: pos, value: l.scalar(y, pos, path)}
	}
}

func (l *loader) count(pos Position, path string, depth int, aliased bool) bool {
	if l.stopped {
		return false
	}
	l.nodes++
	if aliased {
		l.aliased++
	}
	switch {
	case depth > MaxDepth:
		l.errorf(pos, "", "flatten it", "the document is nested more than %d deep", MaxDepth)
	case l.nodes > maxNodes:
		l.errorf(pos, "", "split it", "the document has more than %d values", maxNodes)
	case l.aliased > maxAliasedNodes:
		l.errorf(pos, path, "write the values out", "aliases expand to more than %d values", maxAliasedNodes)
	default:
		return true
	}
	l.stopped = true
	return false
}

func (l *loader) convertMapping(y *yaml.Node, pos Position, path string, depth int, through []*yaml.Node) *node {
	n := &node{kind: mappingNode, pos: pos, entries: make([]entry, 0, len(y.Content)/2)}
	seen := make(map[string]Position, len(y.Content)/2)
	var merged []*node
	for i := 0; i+1 < len(y.Content); i += 2 {
		k, v := y.Content[i], y.Content[i+1]
		keyPos := Position{File: l.file, Line: k.Line, Column: k.Column}
		if k.Kind == yaml.AliasNode && k.Alias != nil {
			k = k.Alias
		}
		if k.Kind != yaml.ScalarNode {
			l.errorf(keyPos, path, "write a plain name", "a key must be a string, not a list or a map")
			continue
		}
		if k.ShortTag() == "!!merge" {
			merged = append(merged, l.mergeSources(v, path, depth, through)...)
			continue
		}
		here := keyPath(path, k.Value)
		if first, twice := seen[k.Value]; twice {
			if depth == 0 && k.Value == l.join && l.joinLists(n.entry(k.Value), v, keyPos, depth, through) {
				continue
			}
			l.errorf(keyPos, here, "remove one of the two", "the key %q is there twice, first in line %d", clip(k.Value), first.Line)
			continue
		}
		seen[k.Value] = keyPos
		n.entries = append(n.entries, entry{key: k.Value, pos: keyPos, value: l.convert(v, here, depth+1, through)})
	}
	for _, source := range merged {
		for _, e := range source.entries {
			if _, there := seen[e.key]; !there {
				seen[e.key] = e.pos
				n.entries = append(n.entries, e)
			}
		}
	}
	return n
}

// joinLists appends a repeated list to the first one.
func (l *loader) joinLists(first *entry, v *yaml.Node, keyPos Position, depth int, through []*yaml.Node) bool {
	if first.value.kind != sequenceNode || v.Kind != yaml.SequenceNode {
		return false
	}
	l.warnf(keyPos, first.key, "write one list", "the key %q is there twice, first in line %d; the lists are joined", first.key, first.pos.Line)
	joined := *first.value
	joined.items = slices.Clone(joined.items)
	for _, item := range v.Content {
		joined.items = append(joined.items, l.convert(item, indexPath(first.key, len(joined.items)), depth+2, through))
	}
	first.value = &joined
	return true
}

// mergeSources gives the mappings that a `<<` names.
func (l *loader) mergeSources(v *yaml.Node, path string, depth int, through []*yaml.Node) []*node {
	n := l.convert(v, keyPath(path, "<<"), depth+1, through)
	sources := []*node{n}
	if n.kind == sequenceNode {
		sources = n.items
	}
	out := sources[:0:0]
	for _, s := range sources {
		if s.kind == mappingNode {
			out = append(out, s)
		} else if !l.stopped {
			l.errorf(n.pos, keyPath(path, "<<"), "merge an alias of a map, as in `<<: *defaults`", "only maps can be merged, this is %s", s.describe())
		}
	}
	return out
}

// scalar gives the value of a scalar.
func (l *loader) scalar(y *yaml.Node, pos Position, path string) any {
	switch y.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		switch strings.ToLower(y.Value) {
		case "true", "yes", "on", "y":
			return true
		case "false", "no", "off", "n":
			return false
		}
	case "!!int":
		text := strings.ReplaceAll(y.Value, "_", "")
		if i, err := strconv.ParseInt(text, 0, 64); err == nil {
			return i
		}
		if f, err := strconv.ParseFloat(text, 64); err == nil && !math.IsInf(f, 0) {
			return f
		}
		l.errorf(pos, path, "quote it if it is a string", "this number is too large")
	case "!!float":
		f, err := strconv.ParseFloat(strings.ReplaceAll(y.Value, "_", ""), 64)
		if err == nil && !math.IsInf(f, 0) && !math.IsNaN(f) {
			return f
		}
		l.errorf(pos, path, "quote it if it is a string", "%s is not a finite number", clip(y.Value))
	case "!!str", "!!timestamp", "!!binary", "!!merge":
		return y.Value
	default:
		l.errorf(pos, path, "remove it", "the tag %s is not known", clip(y.Tag))
	}
	return y.Value
}

func keyPath(path, key string) string {
	key = clip(key)
	if path == "" {
		return key
	}
	return path + "." + key
}

func indexPath(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// clip shortens what a message or a path repeats from the document.
func clip(s string) string {
	const limit = 80
	if len(s) <= limit {
		return s
	}
	cut := limit
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

package spec

import (
	"errors"
	"strings"
)

// maxSchemaPaths bounds the subschemas that one value can be checked against through references.
const maxSchemaPaths = 10_000

// boundSchema refuses schemas whose references multiply: thirty definitions that each name the next one twice would take 2^30 checks.
// Recursion, as for trees, counts once: the depth of the value bounds it.
func boundSchema(doc map[string]any) error {
	b := &schemaBound{doc: doc, cost: map[string]int{}}
	if b.count(doc, 0) > maxSchemaPaths {
		return errors.New("its references multiply to more than ten thousand subschemas")
	}
	return nil
}

type schemaBound struct {
	doc  map[string]any
	cost map[string]int // of a reference; 0 while it is being counted
}

func (b *schemaBound) count(v any, depth int) int {
	if depth > 4*MaxDepth {
		return maxSchemaPaths + 1
	}
	total := 1
	add := func(n int) { total = min(total+n, maxSchemaPaths+1) }
	switch v := v.(type) {
	case []any:
		for _, item := range v {
			add(b.count(item, depth+1))
		}
	case map[string]any:
		for key, item := range v {
			ref, isString := item.(string)
			if !isString || key != "$ref" && key != "$dynamicRef" && key != "$recursiveRef" {
				if key != "$defs" && key != "definitions" && key != "default" && key != "enum" && key != "const" && key != "examples" {
					add(b.count(item, depth+1))
				}
				continue
			}
			add(b.countRef(ref, depth))
		}
	}
	return total
}

func (b *schemaBound) countRef(ref string, depth int) int {
	if cost, seen := b.cost[ref]; seen {
		return cost
	}
	b.cost[ref] = 0
	cost := 1
	if target, ok := b.target(ref); ok {
		cost = b.count(target, depth+1)
	}
	b.cost[ref] = cost
	return cost
}

// target follows a JSON pointer in the document. Anchors are left to the compiler.
func (b *schemaBound) target(ref string) (any, bool) {
	pointer, ok := strings.CutPrefix(ref, "#")
	if !ok {
		return nil, false
	}
	var v any = b.doc
	for part := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		if part == "" {
			continue
		}
		m, isMap := v.(map[string]any)
		if !isMap {
			return nil, false
		}
		part = strings.ReplaceAll(strings.ReplaceAll(part, "~1", "/"), "~0", "~")
		if v, ok = m[part]; !ok {
			return nil, false
		}
	}
	return v, true
}

package spec

import (
	"fmt"
	"regexp"
	"strings"
)

var variablePattern = regexp.MustCompile(`\$?\$\{([A-Za-z_][A-Za-z0-9_]*)(:-[^{}]*)?\}`)

// substitute puts environment variables in place of `${NAME}` and `${NAME:-default}`; `$${NAME}` stands for the characters. Fields named
// `*_env_var` are left alone: they name what only a runner may read. Nodes are shared, so changed ones are copied.
func substitute(n *node, lookup func(string) (string, bool), c *collector, path string) *node {
	if lookup == nil {
		return n
	}
	switch n.kind {
	case mappingNode:
		out := *n
		out.entries = make([]entry, len(n.entries))
		for i, e := range n.entries {
			if !strings.HasSuffix(e.key, "_env_var") {
				e.value = substitute(e.value, lookup, c, keyPath(path, e.key))
			}
			out.entries[i] = e
		}
		return &out
	case sequenceNode:
		out := *n
		out.items = make([]*node, len(n.items))
		for i, item := range n.items {
			out.items[i] = substitute(item, lookup, c, indexPath(path, i))
		}
		return &out
	default:
		return substituteScalar(n, lookup, c, path)
	}
}

func substituteScalar(n *node, lookup func(string) (string, bool), c *collector, path string) *node {
	s, ok := n.value.(string)
	if !ok || !strings.Contains(s, "${") {
		return n
	}
	out := *n
	out.value = variablePattern.ReplaceAllStringFunc(s, func(match string) string {
		if strings.HasPrefix(match, "$$") {
			return match[1:]
		}
		parts := variablePattern.FindStringSubmatch(match)
		name, fallback := parts[1], parts[2]
		if value, set := lookup(name); set {
			out.env = true
			return value
		}
		if fallback != "" {
			out.env = true
			return strings.TrimPrefix(fallback, ":-")
		}
		c.errorf(n.pos, path, fmt.Sprintf("set %s, or give it a default with `${%s:-…}`; a secret belongs in a `*_env_var` field", name, name),
			"the environment variable %s is not set", name)
		return match
	})
	return &out
}

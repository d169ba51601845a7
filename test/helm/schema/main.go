// Command schema writes the JSON Schema of a chart's values.yaml: types come from the defaults, descriptions from the comments,
// and what a comment says after @schema is merged in; {"free": true} allows any keys.
package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"strings"

	"go.yaml.in/yaml/v4"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: schema VALUES.yaml")
		os.Exit(2)
	}
	out, err := generate(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "schema:", err)
		os.Exit(1)
	}
	_, _ = os.Stdout.Write(out)
}

func generate(name string) ([]byte, error) {
	text, err := os.ReadFile(name) //nolint:gosec // named on the command line
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	root, err := schemaOf(doc.Content[0], "", "")
	if err != nil {
		return nil, err
	}
	properties, _ := root["properties"].(map[string]any)
	properties["global"] = map[string]any{"type": "object", "description": "Helm's own"}
	root["$schema"], root["title"] = "http://json-schema.org/draft-07/schema#", "The values of the chart specql"
	delete(root, "description")
	out, err := json.MarshalIndent(root, "", "  ")
	return append(out, '\n'), err
}

// schemaOf is the schema of a value with the comment above its key.
func schemaOf(n *yaml.Node, comment, path string) (map[string]any, error) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	s := map[string]any{}
	var words []string
	extra := map[string]any{}
	for line := range strings.SplitSeq(comment, "\n") {
		line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#"))
		if text, ok := strings.CutPrefix(line, "@schema "); ok {
			if err := json.Unmarshal([]byte(text), &extra); err != nil {
				return nil, fmt.Errorf("line %d, %s: @schema: %w", n.Line, path, err)
			}
		} else if line != "" {
			words = append(words, line)
		}
	}
	if len(words) > 0 {
		s["description"] = strings.Join(words, " ")
	}
	free := extra["free"] == true
	delete(extra, "free")
	switch n.Kind {
	case yaml.MappingNode:
		s["type"] = "object"
		if free || len(n.Content) == 0 {
			break
		}
		properties := map[string]any{}
		if err := fields(n, path, properties); err != nil {
			return nil, err
		}
		s["properties"], s["additionalProperties"] = properties, false
	case yaml.SequenceNode:
		s["type"] = "array"
	case yaml.ScalarNode:
		switch n.ShortTag() {
		case "!!bool":
			s["type"] = "boolean"
		case "!!int":
			s["type"] = "integer"
		case "!!str":
			s["type"] = "string"
		default:
			return nil, fmt.Errorf("line %d, %s: a default of type %s says nothing of what is wanted", n.Line, path, n.ShortTag())
		}
	default:
		return nil, fmt.Errorf("line %d, %s: not a value", n.Line, path)
	}
	maps.Copy(s, extra)
	return s, nil
}

// fields puts the schemas of a mapping's fields into properties; merged ones first.
func fields(n *yaml.Node, path string, properties map[string]any) error {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if key, value := n.Content[i], n.Content[i+1]; key.Value == "<<" {
			if value.Kind == yaml.AliasNode {
				value = value.Alias
			}
			if err := fields(value, path, properties); err != nil {
				return err
			}
		}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Value == "<<" {
			continue
		}
		s, err := schemaOf(value, key.HeadComment, path+"."+key.Value)
		if err != nil {
			return err
		}
		if old, ok := properties[key.Value].(map[string]any); ok && old["type"] == s["type"] {
			for k, v := range old { // what it is merged over says more than another default does
				if _, there := s[k]; !there {
					s[k] = v
				}
			}
		}
		properties[key.Value] = s
	}
	return nil
}

// Command kubernetes splits the swagger.json of a Kubernetes version, as its Go module has it, into strict schemas
// that kubeconform reads: kubernetes SWAGGER DIR.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: kubernetes SWAGGER DIR")
		os.Exit(2)
	}
	if err := split(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "kubernetes:", err)
		os.Exit(1)
	}
}

type object = map[string]any

func split(swagger, dir string) error {
	text, err := os.ReadFile(swagger) //nolint:gosec // named on the command line
	if err != nil {
		return err
	}
	var doc struct {
		Definitions map[string]object `json:"definitions"`
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil { //nolint:gosec // named on the command line
		return err
	}
	for name, d := range doc.Definitions {
		kinds, _ := d["x-kubernetes-group-version-kind"].([]any)
		properties, _ := d["properties"].(object)
		if properties["apiVersion"] == nil || properties["kind"] == nil {
			continue
		}
		for _, k := range kinds {
			gvk, _ := k.(object)
			group, _, _ := strings.Cut(fmt.Sprint(gvk["group"]), ".")
			parts := slices.DeleteFunc([]string{strings.ToLower(fmt.Sprint(gvk["kind"])), group, fmt.Sprint(gvk["version"])}, func(p string) bool { return p == "" })
			file := strings.Join(parts, "-")
			out, err := json.Marshal(convert(doc.Definitions, d, []string{name}))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file+".json"), out, 0o600); err != nil { //nolint:gosec // named on the command line
				return err
			}
		}
	}
	return nil
}

// convert resolves references, and lets objects have the fields alone that they are known to have.
func convert(definitions map[string]object, v any, seen []string) any {
	switch n := v.(type) {
	case []any:
		out := make([]any, len(n))
		for i := range n {
			out[i] = convert(definitions, n[i], seen)
		}
		return out
	case object:
		if ref, ok := n["$ref"].(string); ok {
			name := ref[strings.LastIndexByte(ref, '/')+1:]
			if strings.HasSuffix(name, "JSONSchemaProps") || slices.Contains(seen, name) {
				return object{"type": "object"}
			}
			return convert(definitions, definitions[name], append(slices.Clone(seen), name))
		}
		if n["format"] == "int-or-string" {
			return object{"oneOf": []any{object{"type": []any{"string", "null"}}, object{"type": []any{"integer", "null"}}}}
		}
		out := object{}
		for k, e := range n {
			switch {
			case k == "required":
				out[k] = e
			case k == "description" || strings.HasPrefix(k, "x-kubernetes-"):
			default:
				out[k] = convert(definitions, e, seen)
			}
		}
		if t, ok := out["type"].(string); ok && t != "object" {
			out["type"] = []any{t, "null"}
		}
		if _, ok := n["properties"].(object); ok && n["type"] == "object" {
			out["additionalProperties"] = false
		}
		return out
	}
	return v
}

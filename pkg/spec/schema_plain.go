package spec

import (
	"encoding/json"
	"math"
	"strings"
)

// plainSchema is a schema of types, required fields and items alone, as the shorthand writes them. Most are, and nearly all values match;
// for those the library, which takes twenty times as long, does not have to be asked.
type plainSchema struct {
	types      jsonTypes
	required   []string
	properties map[string]*plainSchema
	items      *plainSchema
}

// jsonTypes is a set of types.
type jsonTypes uint8

const (
	nullType jsonTypes = 1 << iota
	booleanType
	integerType
	numberType
	stringType
	arrayType
	objectType
)

var jsonTypeNames = map[string]jsonTypes{
	"null": nullType, "boolean": booleanType, "integer": integerType, "number": numberType | integerType, "string": stringType, "array": arrayType, "object": objectType,
}

// plain reads a schema that the library has compiled; nil where it says anything else.
func plain(doc map[string]any) *plainSchema {
	p := &plainSchema{}
	for key, value := range doc {
		ok := true
		switch key {
		case "type":
			p.types, ok = plainTypes(value)
		case "required":
			p.required, ok = plainStrings(value)
		case "properties":
			properties, isMap := value.(map[string]any)
			ok = isMap
			p.properties = make(map[string]*plainSchema, len(properties))
			for name, property := range properties {
				if p.properties[name] = plainPart(property); p.properties[name] == nil {
					return nil
				}
			}
		case "items":
			p.items = plainPart(value)
			ok = p.items != nil
		case "default", "description", "title", "examples": // they do not say what matches
		default:
			ok = false
		}
		if !ok {
			return nil
		}
	}
	return p
}

func plainPart(v any) *plainSchema {
	doc, ok := v.(map[string]any)
	if !ok {
		return nil
	}
	return plain(doc)
}

func plainTypes(v any) (types jsonTypes, ok bool) {
	if name, isString := v.(string); isString {
		return jsonTypeNames[name], jsonTypeNames[name] != 0
	}
	names, ok := plainStrings(v)
	for _, name := range names {
		ok = ok && jsonTypeNames[name] != 0
		types |= jsonTypeNames[name]
	}
	return types, ok && types != 0
}

func plainStrings(v any) (out []string, ok bool) {
	list, ok := v.([]any)
	for _, item := range list {
		s, isString := item.(string)
		ok = ok && isString
		out = append(out, s)
	}
	return out, ok
}

// holds says that a value matches. Where it does not, or is of a kind that takes a closer look, it says false. A nil one knows of nothing
// that matches.
func (p *plainSchema) holds(v any) bool {
	if p == nil || p.types != 0 && p.types&plainType(v) == 0 {
		return false
	}
	switch v := v.(type) {
	case map[string]any:
		for _, name := range p.required {
			if _, there := v[name]; !there {
				return false
			}
		}
		for name, property := range p.properties {
			if item, there := v[name]; there && !property.holds(item) {
				return false
			}
		}
	case []any:
		for i := 0; p.items != nil && i < len(v); i++ {
			if !p.items.holds(v[i]) {
				return false
			}
		}
	}
	return true
}

// plainType is the narrowest type of a value that is told at a glance; none for one of Go alone.
func plainType(v any) jsonTypes {
	switch v := v.(type) {
	case nil:
		return nullType
	case bool:
		return booleanType
	case string:
		return stringType
	case map[string]any:
		return objectType
	case []any:
		return arrayType
	case json.Number:
		if digits := strings.TrimPrefix(string(v), "-"); digits != "" && strings.Trim(digits, "0123456789") == "" {
			return integerType
		}
		return numberType
	case float64:
		if v == math.Trunc(v) {
			return integerType
		}
		return numberType
	case int, int64, int32, uint32, uint64:
		return integerType
	}
	return 0
}

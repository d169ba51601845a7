package ddl

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// ColumnType is the PostgreSQL type of a field's column; empty where the field's type is unknown.
func ColumnType(f *spec.Field) string {
	switch f.Type {
	case "string", "text":
		return "text"
	case "integer":
		return "bigint"
	case "number":
		return "double precision"
	case "decimal":
		return "numeric"
	case "boolean":
		return "boolean"
	case "object", "array", "json":
		return "jsonb"
	case "uuid":
		return "uuid"
	case "date":
		return "date"
	case "timestamp":
		return "timestamp with time zone"
	}
	return ""
}

// constant writes a value that the field takes. The type is written where PostgreSQL would
// not see it.
func constant(f *spec.Field, v any) (string, error) {
	switch ColumnType(f) {
	case "jsonb":
		raw, err := json.Marshal(v)
		if err != nil {
			return "", fmt.Errorf("is no JSON: %w", err)
		}
		// PostgreSQL's jsonb holds text, and its text no NUL.
		if strings.Contains(strings.ReplaceAll(string(raw), `\\`, ""), `\u0000`) {
			return "", errNUL
		}
		return literal(string(raw)) + "::jsonb", nil
	case "boolean":
		if b, ok := v.(bool); ok {
			return strconv.FormatBool(b), nil
		}
	case "bigint", "double precision", "numeric":
		return numeral(v)
	case "text":
		if s, ok := v.(string); ok {
			return textConstant(s)
		}
	default:
		if s, ok := v.(string); ok {
			text, err := textConstant(s)
			return text + "::" + ColumnType(f), err
		}
	}
	return "", fmt.Errorf("is no %s", f.Type)
}

var errNUL = fmt.Errorf("holds a NUL character, which PostgreSQL's text cannot")

func textConstant(s string) (string, error) {
	if strings.ContainsRune(s, 0) {
		return "", errNUL
	}
	return literal(s), nil
}

// numeral writes a number with all its digits.
func numeral(v any) (string, error) {
	switch v := v.(type) {
	case int:
		return strconv.Itoa(v), nil
	case int64:
		return strconv.FormatInt(v, 10), nil
	case float64:
		return float(v)
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return strconv.FormatInt(i, 10), nil
		}
		f, err := v.Float64()
		if err != nil {
			return "", fmt.Errorf("is no number: %w", err)
		}
		return float(f)
	case string: // a decimal
		digits := strings.TrimLeft(v, "+-")
		if digits == "" || strings.Trim(digits, "0123456789.") != "" {
			return "", fmt.Errorf("is no number")
		}
		if v[0] == '-' {
			digits = "-" + digits
		}
		return digits, nil
	}
	return "", fmt.Errorf("is no number")
}

func float(f float64) (string, error) {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return "", fmt.Errorf("is no number that JSON has")
	}
	if f == math.Trunc(f) && math.Abs(f) < 1e21 {
		return strconv.FormatFloat(f, 'f', -1, 64), nil
	}
	return strconv.FormatFloat(f, 'g', -1, 64), nil
}

package spec

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// RowError says what is wrong with a row.
type RowError struct {
	Entity     string
	Violations []Violation
}

// Error lists the violations in one line. It never holds a value.
func (e *RowError) Error() string {
	parts := make([]string, len(e.Violations))
	for i, v := range e.Violations {
		parts[i] = v.String()
	}
	return "the row of " + e.Entity + " is not valid: " + strings.Join(parts, "; ")
}

// NewRow makes a row of the entity: of the input's values where their keys are fields, else of the defaults. Keys of the input that are not
// fields are left out. A missing `id` is newID() for a uuid or a string; of an integer it is left out, for the database to
// count. Other fields without a value are null. The error is a *RowError.
func (e *Entity) NewRow(input map[string]any, newID func() string) (map[string]any, error) {
	row := make(map[string]any, len(e.Fields))
	for _, f := range e.Fields {
		value, given := input[f.Name]
		switch {
		case given && (value != nil || f.Name != primaryKey):
			row[f.Name] = value
		case f.Default != nil:
			row[f.Name] = cloneValue(f.Default)
		case f.Name == primaryKey && f.Type == "integer":
		case f.Name == primaryKey:
			row[f.Name] = newID()
		default:
			row[f.Name] = nil
		}
	}
	if err := e.CheckRow(row); err != nil {
		return nil, err
	}
	return row, nil
}

// CheckRow checks a whole row, or the fields of an update: what is there must be a field with a value that fits. The error is a *RowError.
func (e *Entity) CheckRow(row map[string]any) error {
	var violations []Violation
	for _, f := range e.Fields {
		value, given := row[f.Name]
		if !given {
			continue
		}
		if value == nil {
			if f.Required || f.Name == primaryKey {
				violations = append(violations, Violation{Path: f.Name, Message: "is required"})
			}
			continue
		}
		if fault := f.check(value); fault != "" {
			violations = append(violations, Violation{Path: f.Name, Message: fault})
		}
	}
	known := make(map[string]bool, len(e.Fields))
	for _, f := range e.Fields {
		known[f.Name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(row)) {
		if !known[name] && len(violations) < maxViolations {
			violations = append(violations, Violation{Path: clip(name), Message: "is not a field; " + suggest(name, e.FieldNames())})
		}
	}
	if len(violations) > 0 {
		return &RowError{Entity: e.Name, Violations: violations}
	}
	return nil
}

// check says what is wrong with a value that is not null; "" if nothing.
func (f *Field) check(v any) string {
	if v == nil {
		return ""
	}
	if fault := f.checkType(v); fault != "" {
		return fault
	}
	if f.Validation == nil {
		return ""
	}
	if len(f.Validation.Enum) > 0 && !f.inEnum(v) {
		return "must be one of " + listValues(f.Validation.Enum)
	}
	if s, ok := v.(string); ok && f.pattern != nil && !f.pattern.MatchString(s) {
		return fmt.Sprintf("must match the pattern %q", clip(f.Validation.Pattern))
	}
	if f.Type == "decimal" {
		return f.checkDecimalBounds(v)
	}
	if number, ok := toNumber(v, false); ok {
		if low := f.Validation.Min; low != nil && number < *low {
			return fmt.Sprintf("must be at least %v", *low)
		}
		if high := f.Validation.Max; high != nil && number > *high {
			return fmt.Sprintf("must be at most %v", *high)
		}
	}
	return ""
}

// inEnum says whether the enum has a value; decimals are equal where their values are.
func (f *Field) inEnum(v any) bool {
	if f.Type != "decimal" {
		return containsValue(f.Validation.Enum, v)
	}
	exactly := decimal(v)
	return slices.ContainsFunc(f.Validation.Enum, func(candidate any) bool {
		other := decimal(candidate)
		return exactly != nil && other != nil && exactly.Cmp(other) == 0
	})
}

// checkDecimalBounds compares a decimal exactly, with the bounds as they were written.
func (f *Field) checkDecimalBounds(v any) string {
	exactly := decimal(v)
	if low := f.Validation.Min; low != nil && compareDecimals(exactly, decimal(*low)) < 0 {
		return fmt.Sprintf("must be at least %v", *low)
	}
	if high := f.Validation.Max; high != nil && compareDecimals(exactly, decimal(*high)) > 0 {
		return fmt.Sprintf("must be at most %v", *high)
	}
	return ""
}

// compareDecimals takes what is no decimal for equal to everything.
func compareDecimals(a, b *big.Rat) int {
	if a == nil || b == nil {
		return 0
	}
	return a.Cmp(b)
}

// decimal is the exact value of a number, or of a string that checkType took for a decimal;
// nil of anything else. A float64 is the shortest decimal that stands for it.
func decimal(v any) *big.Rat {
	text := ""
	switch v := v.(type) {
	case string:
		text = v
	case int:
		return new(big.Rat).SetInt64(int64(v))
	case int64:
		return new(big.Rat).SetInt64(v)
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return new(big.Rat).SetInt64(i)
		}
		f, err := v.Float64()
		if err != nil {
			return nil
		}
		return decimal(f)
	case float64:
		text = strconv.FormatFloat(v, 'g', -1, 64)
	}
	r, ok := new(big.Rat).SetString(text)
	if !ok {
		return nil
	}
	return r
}

var (
	uuidPattern    = regexp.MustCompile(`^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$`)
	decimalPattern = regexp.MustCompile(`^[+-]?(\d+(\.\d*)?|\.\d+)$`)
)

const maxDecimalDigits = 1000

func (f *Field) checkType(v any) string {
	if fault := checkValue(v, 0); fault != "" {
		return fault
	}
	s, isString := v.(string)
	switch f.Type {
	case "string", "text":
		if !isString {
			return "must be a string, is " + describeValue(v)
		}
		if strings.ContainsRune(s, 0) {
			return "must not hold a NUL character"
		}
	case "integer":
		number, ok := toNumber(v, false)
		if !ok || !isWhole(number) {
			return "must be a whole number, is " + describeValue(v)
		}
	case "number":
		if _, ok := toNumber(v, false); !ok {
			return "must be a number, is " + describeValue(v)
		}
	case "decimal":
		if isString && (len(s) > maxDecimalDigits || !decimalPattern.MatchString(s)) {
			return "must be a number, is " + describeValue(v)
		}
		if _, ok := toNumber(v, true); !ok {
			return "must be a number, is " + describeValue(v)
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			return "must be true or false, is " + describeValue(v)
		}
	case "object":
		if _, ok := v.(map[string]any); !ok {
			return "must be an object, is " + describeValue(v)
		}
	case "array":
		if _, ok := v.([]any); !ok {
			return "must be a list, is " + describeValue(v)
		}
	case "uuid":
		if !uuidPattern.MatchString(s) {
			return "must be a UUID"
		}
	case "date":
		if _, err := time.Parse(time.DateOnly, s); err != nil {
			return "must be a date such as \"2030-01-31\""
		}
	case "timestamp":
		if _, err := time.Parse(time.RFC3339Nano, s); err != nil {
			return "must be a timestamp such as \"2030-01-31T12:00:00Z\""
		}
	}
	return ""
}

// toNumber reads a number, and a string that holds one if text is set.
func toNumber(v any, text bool) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, true
	case int:
		return float64(v), true
	case int64:
		return float64(v), true
	case json.Number:
		f, err := v.Float64()
		return f, err == nil
	case string:
		if text {
			f, err := strconv.ParseFloat(v, 64)
			return f, err == nil
		}
	}
	return 0, false
}

// containsValue compares scalars as JSON does: 1 and 1.0 are the same.
func containsValue(values []any, v any) bool {
	for _, candidate := range values {
		a, aNumber := exact(candidate)
		b, bNumber := exact(v)
		if aNumber && bNumber {
			if a.Cmp(b) == 0 {
				return true
			}
			continue
		}
		if candidateText, ok := candidate.(string); ok && candidateText == v {
			return true
		}
		if candidateBool, ok := candidate.(bool); ok && candidateBool == v {
			return true
		}
	}
	return false
}

func exact(v any) (*big.Float, bool) {
	switch v := v.(type) {
	case int64:
		return new(big.Float).SetInt64(v), true
	case int:
		return new(big.Float).SetInt64(int64(v)), true
	case float64:
		return big.NewFloat(v), true
	case json.Number:
		f, err := v.Float64()
		return big.NewFloat(f), err == nil
	}
	return nil, false
}

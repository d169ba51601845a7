package ddl

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// check is one rule of a field. Without an expression, note says why.
type check struct{ rule, expression, note string }

// fieldChecks are the rules of a field beyond its column's type. All of them hold for null.
func (g *generator) fieldChecks(f *spec.Field) []check {
	var out []check
	column := quote(f.Name)
	switch f.Type {
	case "object", "array":
		out = append(out, check{rule: "type", expression: "jsonb_typeof(" + column + "::jsonb) = '" + f.Type + "'"})
	case "number", "decimal":
		// NaN and the infinities are no JSON; what is left of them after a subtraction is not 0.
		out = append(out, check{rule: "type", expression: column + " - " + column + " = 0"})
	case "date":
		out = append(out, check{rule: "type", expression: column + " BETWEEN '0001-01-01' AND '9999-12-31'"})
	case "timestamp":
		out = append(out, check{rule: "type", expression: column + " >= '0001-01-01 00:00:00+00' AND " + column + " < '10000-01-01 00:00:00+00'"})
	}
	v := f.Validation
	if v == nil {
		return out
	}
	if len(v.Enum) > 0 {
		out = append(out, g.enum(f))
	}
	if v.Pattern != "" {
		if expression, err := Pattern(v.Pattern); err != nil {
			out = append(out, check{note: fmt.Sprintf("The pattern of %s is checked by the mesh alone: %v.", f.Name, err)})
		} else {
			out = append(out, check{rule: "pattern", expression: column + " ~ " + literal(expression)})
		}
	}
	if v.Min != nil {
		out = append(out, check{rule: "min", expression: bound(f, ">=", *v.Min)})
	}
	if v.Max != nil {
		out = append(out, check{rule: "max", expression: bound(f, "<=", *v.Max)})
	}
	return out
}

func (g *generator) enum(f *spec.Field) check {
	values := make([]string, 0, len(f.Validation.Enum))
	for i, v := range f.Validation.Enum {
		text, err := constant(f, v)
		if err != nil {
			g.errorf(f.Position, fmt.Sprintf("fields.%s.validation.enum[%d]", f.Name, i), "", "the value %v", err)
			continue
		}
		values = append(values, text)
	}
	column := quote(f.Name)
	if ColumnType(f) == "jsonb" {
		column += "::jsonb"
	}
	return check{rule: "enum", expression: column + " IN (" + strings.Join(values, ", ") + ")"}
}

// exactBound is where a float64 begins to skip whole numbers.
const exactBound = 1 << 53

// bound compares as spec does: decimals exactly, other numbers as a float64.
func bound(f *spec.Field, operator string, limit float64) string {
	column := quote(f.Name)
	text, err := float(limit)
	if err != nil {
		// No number of JSON is beyond infinity, and none is on this side of NaN.
		text = "'" + strconv.FormatFloat(limit, 'g', -1, 64) + "'::double precision"
		column += "::double precision"
	} else if f.Type == "integer" && math.Abs(limit) >= exactBound {
		column += "::double precision"
	}
	return column + " " + operator + " " + text
}

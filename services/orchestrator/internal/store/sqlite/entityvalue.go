package sqlite

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }

// encode turns a JSON-like value into what a column of a declared type keeps.
func encode(kind string, v any) (any, error) {
	if v == nil {
		return nil, nil
	}
	switch kind {
	case typeJSON:
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		return string(b), nil
	case typeInteger:
		return encodeInteger(v)
	case typeReal:
		return encodeReal(v)
	case typeBoolean:
		b, ok := v.(bool)
		if !ok {
			return nil, fmt.Errorf("want true or false, have %T", v)
		}
		return boolValue(b), nil
	case typeDecimal:
		if s, ok := v.(string); ok {
			return s, nil
		}
		if i, err := encodeInteger(v); err == nil {
			return i, nil
		}
		return encodeReal(v)
	case typeUUID:
		if s, ok := v.(string); ok {
			return strings.ToLower(s), nil
		}
	case typeTimestamp:
		if t, ok := v.(time.Time); ok {
			return t.UTC().Format(time.RFC3339Nano), nil
		}
	}
	s, ok := v.(string)
	if !ok {
		return nil, fmt.Errorf("want a string, have %T", v)
	}
	return s, nil
}

func encodeInteger(v any) (any, error) {
	switch v := v.(type) {
	case int:
		return int64(v), nil
	case int64:
		return v, nil
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return i, nil
		}
		f, err := v.Float64()
		if err != nil {
			return nil, err
		}
		return encodeInteger(f)
	case float64:
		// Beyond these bounds a float64 is no int64.
		if v != math.Trunc(v) || v < -(1<<63) || v >= 1<<63 {
			return nil, errors.New("not a whole number of 64 bits")
		}
		return int64(v), nil
	case string: // a primary key may come as text
		return strconv.ParseInt(v, 10, 64)
	}
	return nil, fmt.Errorf("want a whole number, have %T", v)
}

func encodeReal(v any) (any, error) {
	f := 0.0
	switch v := v.(type) {
	case int:
		f = float64(v)
	case int64:
		f = float64(v)
	case float64:
		f = v
	case json.Number:
		var err error
		if f, err = v.Float64(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("want a number, have %T", v)
	}
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return nil, errors.New("want a number that JSON has")
	}
	return f, nil
}

// decode is the reverse of encode: whole numbers are int64, others float64.
func decode(kind string, v any) (any, error) {
	switch kind {
	case typeBoolean:
		if i, ok := v.(int64); ok {
			return i != 0, nil
		}
	case typeJSON:
		s, ok := v.(string)
		if !ok {
			return v, nil
		}
		var out any
		if err := json.Unmarshal([]byte(s), &out); err != nil {
			return nil, err
		}
		return out, nil
	}
	if b, ok := v.([]byte); ok {
		return string(b), nil
	}
	return v, nil
}

package sqlite

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/specql/mesh/pkg/fault"
)

// timeLayout is how SQLite's own functions write times, to the microsecond, in UTC: such
// texts sort, and compare with datetime('now').
const timeLayout = "2006-01-02 15:04:05.000000"

// readLayouts are the forms that other writers of the file may have used.
var readLayouts = []string{"2006-01-02 15:04:05", time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05Z07:00", "2006-01-02"}

func timeValue(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UTC().Format(timeLayout)
}

func textValue(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func jsonValue(j json.RawMessage) any {
	if len(j) == 0 {
		return nil
	}
	return string(j)
}

func boolValue(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// errValues are the four columns of an error.
func errValues(e *fault.Error) [4]any {
	if e == nil {
		return [4]any{}
	}
	return [4]any{string(e.Code), e.Message, boolValue(e.Retryable), e.Attempts}
}

// The scanners below read a column that may be null into a plain field.

type textColumn struct{ p *string }

// Scan implements sql.Scanner.
func (c textColumn) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*c.p = ""
	case string:
		*c.p = v
	case []byte:
		*c.p = string(v)
	default:
		*c.p = fmt.Sprint(v)
	}
	return nil
}

type jsonColumn struct{ p *json.RawMessage }

// Scan implements sql.Scanner.
func (c jsonColumn) Scan(v any) error {
	var s string
	if err := (textColumn{&s}).Scan(v); err != nil {
		return err
	}
	*c.p = nil
	if s != "" {
		*c.p = json.RawMessage(s)
	}
	return nil
}

type timeColumn struct{ p *time.Time }

// Scan implements sql.Scanner.
func (c timeColumn) Scan(v any) error {
	*c.p = time.Time{}
	if v == nil {
		return nil
	}
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("a time is kept as %T, want text", v)
	}
	// A layout without a fraction takes one too.
	for _, layout := range readLayouts {
		if t, err := time.Parse(layout, s); err == nil {
			*c.p = t.UTC()
			return nil
		}
	}
	return fmt.Errorf("not a time: %q", s)
}

// secondsColumn reads seconds as a duration.
type secondsColumn struct{ p *time.Duration }

// Scan implements sql.Scanner.
func (c secondsColumn) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*c.p = 0
	case float64:
		*c.p = time.Duration(v * float64(time.Second)).Round(time.Microsecond)
	case int64:
		*c.p = time.Duration(v) * time.Second
	default:
		return fmt.Errorf("seconds are kept as %T", v)
	}
	return nil
}

// errColumns reads the four columns of an error.
type errColumns struct {
	code, message string
	retryable     nullInt
	attempts      nullInt
}

func (c *errColumns) dest() [4]any {
	return [4]any{textColumn{&c.code}, textColumn{&c.message}, &c.retryable, &c.attempts}
}

func (c *errColumns) err() *fault.Error {
	if c.code == "" && c.message == "" {
		return nil
	}
	e := &fault.Error{Code: fault.Code(c.code), Message: c.message, Retryable: c.retryable != 0, Attempts: int(c.attempts)}
	if e.Code == "" {
		e.Code = fault.Internal
	}
	return e
}

// nullInt reads a null as 0.
type nullInt int64

// Scan implements sql.Scanner.
func (n *nullInt) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*n = 0
	case int64:
		*n = nullInt(v)
	default:
		return fmt.Errorf("a whole number is kept as %T", v)
	}
	return nil
}

package intake

import (
	"fmt"
	"strings"

	"github.com/specql/mesh/pkg/fault"
)

// maxViolationBytes bounds the text of one error's violations: they travel in the trailers of
// an answer, of which clients take 8 KiB at least.
const maxViolationBytes = 4 << 10

// Violations gather what is wrong with a request.
type Violations []fault.Violation

// Add notes what is wrong with a field.
func (v *Violations) Add(field, format string, args ...any) {
	*v = append(*v, fault.Violation{Field: field, Description: fmt.Sprintf(format, args...)})
}

// noNUL says what is wrong with a text that PostgreSQL does not hold: a client that is told to ask again would do so for ever.
const noNUL = "holds the character U+0000, which is not kept"

// Text notes a text that cannot be kept.
func (v *Violations) Text(field, text string) {
	if strings.ContainsRune(text, 0) {
		v.Add(field, noNUL)
	}
}

// Value notes the first text in a value as JSON has it that cannot be kept.
func (v *Violations) Value(field string, value any) {
	if at, bad := findNUL(field, value); bad {
		v.Add(at, noNUL)
	}
}

func findNUL(at string, value any) (string, bool) {
	switch value := value.(type) {
	case string:
		return at, strings.ContainsRune(value, 0)
	case []any:
		for i, e := range value {
			if at, bad := findNUL(fmt.Sprintf("%s[%d]", at, i), e); bad {
				return at, true
			}
		}
	case map[string]any:
		for name, e := range value {
			if strings.ContainsRune(name, 0) {
				return at, true
			}
			if at, bad := findNUL(at+"."+name, e); bad {
				return at, true
			}
		}
	}
	return at, false
}

// Err is a VALIDATION error with every violation, nil for none.
func (v Violations) Err() error {
	if len(v) == 0 {
		return nil
	}
	f := fault.New(fault.Validation, "%s: %s", v[0].Field, v[0].Description)
	if strings.HasPrefix(v[0].Description, v[0].Field+":") {
		f.Message = v[0].Description // a place in the document that the field holds
	}
	if len(v) > 1 {
		f.Message += fmt.Sprintf(" (and %d more)", len(v)-1)
	}
	room := maxViolationBytes
	for i := range v {
		if room -= len(v[i].Field) + len(v[i].Description); room < 0 && i > 0 {
			f.Violations = v[:i]
			return f
		}
	}
	f.Violations = v
	return f
}

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

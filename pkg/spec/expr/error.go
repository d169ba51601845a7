package expr

import (
	"slices"
	"strings"
)

// Error is one fault of an expression, found when it was parsed or evaluated.
type Error struct {
	// At is the place in the template, such as `lines[2].price`; empty where the template is one string.
	At string
	// Offset is the position in the string, in bytes.
	Offset int
	// Text is the reference or the expression as written.
	Text string
	// Message says what is wrong, Mend how to put it right. Mend may be empty.
	Message, Mend string
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	if e.At != "" {
		b.WriteString(e.At)
		b.WriteString(": ")
	}
	if e.Text != "" {
		b.WriteString(clip(e.Text, 120))
		b.WriteString(": ")
	}
	b.WriteString(e.Message)
	if e.Mend != "" {
		b.WriteString("; ")
		b.WriteString(e.Mend)
	}
	return b.String()
}

// Errors are all the faults that parsing a template found.
type Errors []*Error

// Error implements error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives the single faults to errors.As.
func (e Errors) Unwrap() []error {
	out := make([]error, len(e))
	for i, err := range e {
		out[i] = err
	}
	return out
}

// clip shortens text for a message, at a rune border.
func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	cut := limit
	for cut > 0 && s[cut]&0xC0 == 0x80 {
		cut--
	}
	return s[:cut] + "…"
}

// listNames writes names for a message, sorted and bounded.
func listNames(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	more := ""
	if len(names) > maxListedNames {
		names, more = names[:maxListedNames], ", …"
	}
	clipped := make([]string, len(names))
	for i, n := range names {
		clipped[i] = clip(n, 64)
	}
	return strings.Join(clipped, ", ") + more
}

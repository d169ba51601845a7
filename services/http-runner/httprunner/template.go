package httprunner

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/fault"
)

// template is text with {field} places that are filled from the input.
type template struct {
	parts []part
}

// part is literal text, or a field.
type part struct {
	text  string
	field string
	// slashes says that slashes of the value stay: {+field}, as in RFC 6570.
	slashes bool
}

var place = regexp.MustCompile(`\{(\+?)([A-Za-z_][A-Za-z0-9_-]*)\}`)

// parseTemplate reads a template. Braces that hold no field name are text.
func parseTemplate(s string) template {
	var t template
	last := 0
	for _, m := range place.FindAllStringSubmatchIndex(s, -1) {
		if m[0] > last {
			t.parts = append(t.parts, part{text: s[last:m[0]]})
		}
		t.parts = append(t.parts, part{field: s[m[4]:m[5]], slashes: m[2] != m[3]})
		last = m[1]
	}
	if last < len(s) {
		t.parts = append(t.parts, part{text: s[last:]})
	}
	return t
}

func (t template) hasFields() bool {
	return slices.ContainsFunc(t.parts, func(p part) bool { return p.field != "" })
}

// only is the field that the template is made of, "" if there is more to it.
func (t template) only() string {
	if len(t.parts) == 1 {
		return t.parts[0].field
	}
	return ""
}

// input is the job's input and which of its fields have found a place outside the body.
type input struct {
	raw    json.RawMessage
	fields map[string]json.RawMessage
	used   map[string]bool
	// filled is how many bytes have gone into templates.
	filled int
}

// maxFilled bounds what one input may put into path, query and headers, in bytes.
const maxFilled = 1 << 20

func readInput(raw json.RawMessage) (*input, *fault.Error) {
	in := &input{raw: raw, used: map[string]bool{}}
	if len(raw) == 0 {
		in.raw = json.RawMessage(`{}`)
	}
	if string(in.raw) == "{}" {
		in.fields = map[string]json.RawMessage{}
		return in, nil
	}
	if err := json.Unmarshal(in.raw, &in.fields); err != nil || in.fields == nil {
		return nil, fault.Wrap(err, fault.Validation, "the input is not a JSON object")
	}
	return in, nil
}

// text gives a field as text and says whether the input has it. null counts as absent.
func (in *input) text(field string) (string, bool, *fault.Error) {
	raw, ok := in.fields[field]
	if !ok {
		return "", false, nil
	}
	return in.scalar(field, field, raw)
}

// scalar gives a value of the input as text. field is the input's field that it belongs to,
// name the value's own place, for errors.
func (in *input) scalar(field, name string, raw json.RawMessage) (string, bool, *fault.Error) {
	if string(raw) == "null" {
		return "", false, nil
	}
	text := string(raw)
	switch raw[0] {
	case '{', '[':
		return "", false, fault.New(fault.Validation, "input.%s: text, a number or a boolean is needed to fill {%s}, not %s", name, field, kindOf(raw))
	case '"':
		if err := json.Unmarshal(raw, &text); err != nil {
			return "", false, fault.Wrap(err, fault.Validation, "input.%s is not valid text", name)
		}
	}
	in.used[field] = true
	if in.filled += len(text); in.filled > maxFilled {
		return "", false, fault.New(fault.Validation, "the input fills more than %d bytes of path, query and headers; send large values in the body", maxFilled)
	}
	return text, true, nil
}

func kindOf(raw json.RawMessage) string {
	if raw[0] == '[' {
		return "an array"
	}
	return "an object"
}

// fill writes the template with every field put through escape; where tells the place for
// errors, such as headers.X-Tenant.
func (t template) fill(in *input, where string, escape func(p part, value string) (string, *fault.Error)) (string, *fault.Error) {
	var b strings.Builder
	for _, p := range t.parts {
		if p.field == "" {
			b.WriteString(p.text)
			continue
		}
		value, ok, err := in.text(p.field)
		if err != nil {
			return "", err
		}
		if !ok {
			return "", fault.New(fault.Validation, "%s needs input.%s, which the call does not give", where, p.field)
		}
		if escape != nil {
			if value, err = escape(p, value); err != nil {
				return "", err
			}
		}
		b.WriteString(value)
	}
	return b.String(), nil
}

// pathEscaper escapes values for the path of a URL. strict leaves only the unreserved
// characters, which is the form that AWS signatures are made over.
func pathEscaper(strict bool) func(part, string) (string, *fault.Error) {
	escape := url.PathEscape
	if strict {
		escape = strictEscape
	}
	return func(p part, value string) (string, *fault.Error) {
		if value == "" {
			return "", fault.New(fault.Validation, "input.%s is empty; it fills {%s} in the path, where an empty value would address something else", p.field, p.field)
		}
		segments := strings.FieldsFunc(value, func(r rune) bool { return r == '/' || r == '\\' })
		for _, s := range segments {
			if upOrHere(s) {
				return "", fault.New(fault.Validation, "input.%s holds a %q segment, which must not fill {%s} in the path", p.field, s, p.field)
			}
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return "", fault.New(fault.Validation, "input.%s holds a control character, which must not fill {%s} in the path", p.field, p.field)
		}
		if !p.slashes {
			return escape(value), nil
		}
		parts := strings.Split(value, "/")
		for i := range parts {
			parts[i] = escape(parts[i])
		}
		return strings.Join(parts, "/"), nil
	}
}

// strictEscape leaves nothing but the unreserved characters of RFC 3986.
func strictEscape(s string) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_', c == '~':
			b.WriteByte(c)
		default:
			b.WriteByte('%')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		}
	}
	return b.String()
}

// dotSegments says whether a filled path holds a segment that servers take as "here" or "up",
// written plainly or escaped.
func dotSegments(path string) bool {
	for s := range strings.SplitSeq(path, "/") {
		plain, err := url.PathUnescape(s)
		if err != nil {
			plain = s
		}
		if slices.ContainsFunc(strings.Split(plain, `\`), upOrHere) {
			return true
		}
	}
	return false
}

// upOrHere says whether a segment is . or .., alone or before a ; as some servers read it.
func upOrHere(segment string) bool {
	name, _, _ := strings.Cut(segment, ";")
	return name == "." || name == ".."
}

// values gives what a query or header template stands for: nothing for a template that is
// nothing but an absent field, several for one that is a list.
func (t template) values(in *input, where string) ([]string, *fault.Error) {
	field := t.only()
	if field == "" {
		s, err := t.fill(in, where, nil)
		return []string{s}, err
	}
	raw, ok := in.fields[field]
	if !ok {
		return nil, nil
	}
	in.used[field] = true // null and the empty list, too, have found their place
	if string(raw) == "null" {
		return nil, nil
	}
	if raw[0] != '[' {
		s, _, err := in.text(field)
		return []string{s}, err
	}
	var items []json.RawMessage
	if err := json.Unmarshal(raw, &items); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "input.%s is not a valid array", field)
	}
	in.used[field] = true
	out := make([]string, 0, len(items))
	for i, item := range items {
		s, ok, err := in.scalar(field, fmt.Sprintf("%s[%d]", field, i), item)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, s)
		}
	}
	return out, nil
}

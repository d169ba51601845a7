package httprunner

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/fault"
)

// maxNesting is how deep form fields may nest.
const maxNesting = 32

// rest gives the input's fields that have found no place yet.
func (in *input) rest() map[string]json.RawMessage {
	left := make(map[string]json.RawMessage, len(in.fields))
	for name, raw := range in.fields {
		if !in.used[name] {
			left[name] = raw
		}
	}
	return left
}

// encodeBody makes the body of a kind from what remains of the input, with its content type.
// A body over most bytes may be cut short: it is not for sending.
func (in *input) encodeBody(kind string, most int64) (body []byte, contentType string, err *fault.Error) {
	switch kind {
	case bodyJSON:
		body, err = in.jsonBody()
		return body, "application/json", err
	case bodyForm:
		fields, err := formFields(in.rest(), false, most)
		if err != nil {
			return nil, "", err
		}
		return []byte(fields.encode()), "application/x-www-form-urlencoded", nil
	case bodyRaw:
		return in.rawBody()
	}
	return nil, "", nil
}

func (in *input) jsonBody() ([]byte, *fault.Error) {
	if len(in.used) == 0 {
		return in.raw, nil
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(in.rest()); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the input cannot be written as JSON")
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// rawBody is the field body as it is, else body_base64 decoded, else the one field that is left.
func (in *input) rawBody() ([]byte, string, *fault.Error) {
	left := in.rest()
	if raw, ok := left["body"]; ok {
		return rawValue("body", raw)
	}
	if raw, ok := left["body_base64"]; ok {
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return nil, "", fault.New(fault.Validation, "input.body_base64 must be text")
		}
		data, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, "", fault.New(fault.Validation, "input.body_base64 is not base64: %v", err)
		}
		return data, "application/octet-stream", nil
	}
	switch len(left) {
	case 0:
		return nil, "", nil
	case 1:
		for name, raw := range left {
			return rawValue(name, raw)
		}
	}
	names := slices.Sorted(maps.Keys(left))
	return nil, "", fault.New(fault.Validation, "a raw body is the input's field body or body_base64, or its only field; it has %s", clip(strings.Join(names, ", ")))
}

func rawValue(name string, raw json.RawMessage) ([]byte, string, *fault.Error) {
	if string(raw) == "null" {
		return nil, "", nil
	}
	if raw[0] != '"' {
		return raw, "application/json", nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return nil, "", fault.New(fault.Validation, "input.%s is not valid text", name)
	}
	return []byte(text), "text/plain; charset=utf-8", nil
}

// fields are names and values in the order in which they are sent.
type fields []field

type field struct{ name, value string }

func (f fields) encode() string {
	var b strings.Builder
	for i, x := range f {
		if i > 0 {
			b.WriteByte('&')
		}
		b.WriteString(strings.ReplaceAll(strings.ReplaceAll(url.QueryEscape(x.name), "%5B", "["), "%5D", "]"))
		b.WriteByte('=')
		b.WriteString(url.QueryEscape(x.value))
	}
	return b.String()
}

// formFields flattens an object: objects as a[b], arrays as a[0]. With repeat, an array of
// plain values is the same name again and again, as query strings have it. null is left out.
// Past most bytes it stops: what there is then is too large to be sent anyway.
func formFields(object map[string]json.RawMessage, repeat bool, most int64) (fields, *fault.Error) {
	f := flattener{repeat: repeat, most: most}
	for _, name := range slices.Sorted(maps.Keys(object)) {
		var v any
		d := json.NewDecoder(bytes.NewReader(object[name]))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			return nil, fault.Wrap(err, fault.Validation, "input.%s is not valid JSON", clip(name))
		}
		if err := f.flatten(name, v, 0); err != nil {
			return nil, err
		}
	}
	return f.out, nil
}

type flattener struct {
	repeat     bool
	size, most int64
	out        fields
}

func (f *flattener) flatten(name string, v any, depth int) *fault.Error {
	if depth > maxNesting {
		return fault.New(fault.Validation, "input.%s nests deeper than %d levels, which a form cannot hold", clip(name), maxNesting)
	}
	switch v := v.(type) {
	case nil:
		return nil
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if f.size > f.most {
				break
			}
			if err := f.flatten(name+"["+key+"]", v[key], depth+1); err != nil {
				return err
			}
		}
		return nil
	case []any:
		for i, item := range v {
			if f.size > f.most {
				break
			}
			key := name + "[" + strconv.Itoa(i) + "]"
			if f.repeat && !nested(item) {
				key = name
			}
			if err := f.flatten(key, item, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	text := scalarText(v)
	f.size += int64(len(name) + len(text) + len("=&"))
	f.out = append(f.out, field{name, text})
	return nil
}

func nested(v any) bool {
	switch v.(type) {
	case map[string]any, []any:
		return true
	}
	return false
}

// scalarText writes a string, a number or a boolean of decoded JSON.
func scalarText(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	return ""
}

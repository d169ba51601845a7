package shellrunner

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/fault"
)

// piece is a part of an argument: literal text, or a path into the input.
type piece struct {
	text string
	ref  bool
	path []step
}

// step is a field's name or, where the name is empty, a position in a list.
type step struct {
	field string
	index int
}

const (
	root        = "$input"
	maxRefSteps = 64
)

// parseArgument splits an argument at its references. $input stands for the whole input,
// $input.a.b[0] for a part of it; $$input is the text "$input". Any other dollar is itself.
func parseArgument(arg string) ([]piece, error) {
	var pieces []piece
	var text strings.Builder
	for rest := arg; rest != ""; {
		at := strings.Index(rest, root)
		if at < 0 {
			text.WriteString(rest)
			break
		}
		after := rest[at+len(root):]
		switch {
		case after != "" && isName(after[0]): // $inputs, $input_file
			text.WriteString(rest[:at+len(root)])
			rest = after
			continue
		case at > 0 && rest[at-1] == '$':
			text.WriteString(rest[:at-1] + root)
			rest = after
			continue
		}
		text.WriteString(rest[:at])
		p := piece{ref: true}
		var err error
		if p.path, after, err = parsePath(after); err != nil {
			return nil, fmt.Errorf("%q: %w", clip(arg), err)
		}
		p.text = rest[at : len(rest)-len(after)]
		if text.Len() > 0 {
			pieces = append(pieces, piece{text: text.String()})
			text.Reset()
		}
		pieces = append(pieces, p)
		rest = after
	}
	if text.Len() > 0 || len(pieces) == 0 {
		pieces = append(pieces, piece{text: text.String()})
	}
	return pieces, nil
}

func parsePath(s string) (path []step, rest string, err error) {
	for {
		switch {
		case len(s) > 1 && s[0] == '.' && isName(s[1]):
			end := 1
			for end < len(s) && isName(s[end]) {
				end++
			}
			path, s = append(path, step{field: s[1:end]}), s[end:]
		case len(s) > 1 && s[0] == '[' && s[1] >= '0' && s[1] <= '9':
			number, after, ok := strings.Cut(s[1:], "]")
			index, err := strconv.ParseUint(number, 10, 31)
			if !ok || err != nil {
				return nil, "", fmt.Errorf("%q is not a position in a list; write [0]", clip(s))
			}
			path, s = append(path, step{index: int(index)}), after
		default:
			return path, s, nil
		}
		if len(path) > maxRefSteps {
			return nil, "", fmt.Errorf("a reference has at most %d parts", maxRefSteps)
		}
	}
}

// refers tells whether an argument has a reference to the input.
func refers(arg string) bool {
	pieces, err := parseArgument(arg)
	return err == nil && slices.ContainsFunc(pieces, func(p piece) bool { return p.ref })
}

func isName(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// fill gives the argument with its references replaced from the input. A string stands as it
// is, anything else as JSON. An argument stays one argument whatever the values hold.
func fill(arg string, input any) (string, error) {
	pieces, err := parseArgument(arg)
	if err != nil {
		return "", fault.New(fault.Validation, "%v", err)
	}
	var b strings.Builder
	for _, p := range pieces {
		if !p.ref {
			b.WriteString(p.text)
			continue
		}
		v, err := lookup(p, input)
		if err != nil {
			return "", err
		}
		text, ok := v.(string)
		if !ok {
			raw, err := marshal(v)
			if err != nil {
				return "", fault.Wrap(err, fault.Internal, "%s has no JSON form", p.text)
			}
			text = string(raw)
		}
		if strings.ContainsRune(text, 0) {
			return "", fault.New(fault.Validation, "%s holds a NUL character, which no argument can; send it on stdin", p.text)
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

func lookup(p piece, input any) (any, error) {
	v, at := input, root
	for _, s := range p.path {
		if s.field == "" {
			list, ok := v.([]any)
			if !ok {
				return nil, fault.New(fault.Validation, "%s: %s is not a list but %s", p.text, at, kind(v))
			}
			if s.index >= len(list) {
				return nil, fault.New(fault.Validation, "%s: %s has %d items", p.text, at, len(list))
			}
			v, at = list[s.index], at+"["+strconv.Itoa(s.index)+"]"
			continue
		}
		object, ok := v.(map[string]any)
		if !ok {
			return nil, fault.New(fault.Validation, "%s: %s is not an object but %s", p.text, at, kind(v))
		}
		next, ok := object[s.field]
		if !ok {
			return nil, fault.New(fault.Validation, "%s: %s has no field %q; the fields there are: %s", p.text, at, s.field, fields(object))
		}
		v, at = next, at+"."+s.field
	}
	return v, nil
}

func fields(object map[string]any) string {
	if len(object) == 0 {
		return "none"
	}
	return clip(strings.Join(slices.Sorted(maps.Keys(object)), ", "))
}

func kind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case string:
		return "a string"
	case json.Number:
		return "a number"
	case bool:
		return "a boolean"
	case []any:
		return "a list"
	}
	return "an object"
}

// marshal writes JSON on one line, and < > & as themselves.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return bytes.TrimSpace(b.Bytes()), nil
}

// decodeInput reads the input, numbers kept as they are written.
func decodeInput(raw json.RawMessage) (any, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return map[string]any{}, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the input is not JSON: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Validation, "the input has text after the end of its JSON value")
	}
	if _, ok := v.(map[string]any); !ok {
		return nil, fault.New(fault.Validation, "the input must be a JSON object, is %s", kind(v))
	}
	return v, nil
}

// clip shortens hostile text for a message.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

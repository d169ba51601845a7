package runner

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"

	"github.com/invopop/jsonschema"

	"github.com/specql/mesh/pkg/fault"
)

// SchemaOf makes the JSON Schema (draft 2020-12) of a configuration struct, for [Type].
//
// The json tags name the keys and a field without omitempty is required; the jsonschema
// tags hold description, enum, minimum and so on; unknown keys are not allowed. T must not
// contain itself.
func SchemaOf[T any]() json.RawMessage {
	r := jsonschema.Reflector{Anonymous: true, ExpandedStruct: true, DoNotReference: true}
	raw, err := json.Marshal(r.ReflectFromType(reflect.TypeFor[T]()))
	if err != nil { // a schema is plain data: this cannot happen for a struct
		return json.RawMessage(`true`)
	}
	return raw
}

// Decode reads a configuration object strictly: an unknown key, a wrong type or trailing
// text is a VALIDATION error that says the place and the mend. Empty raw counts as {}.
// Bounds such as minimum and required keys are for [CheckService] to check.
func Decode[T any](raw json.RawMessage) (T, error) {
	var v T
	if len(bytes.TrimSpace(raw)) == 0 {
		return v, nil
	}
	err := decodeStrict(raw, &v)
	if err == nil {
		return v, nil
	}
	var zero T
	// The slow way, for a better text.
	for _, p := range checkJSON(SchemaOf[T](), raw, "") {
		if p.structural {
			return zero, fault.New(fault.Validation, "%s", p.text())
		}
	}
	return zero, fault.Wrap(err, fault.Validation, "not a valid configuration object: %v", err)
}

func decodeStrict(raw []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("text after the end of the JSON value")
	}
	return nil
}

// Digest is the SHA-256 of the canonical JSON of v, keys sorted, in lower-case hexadecimal
// digits. It is empty for a value that has no JSON form.
func Digest(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return ""
	}
	plain, err := decodeAny(raw)
	if err != nil {
		return ""
	}
	if raw, err = json.Marshal(plain); err != nil {
		return ""
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// decodeAny decodes any JSON value and keeps numbers as they are written.
func decodeAny(raw []byte) (any, error) {
	var v any
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("text after the end of the JSON value")
	}
	return v, nil
}

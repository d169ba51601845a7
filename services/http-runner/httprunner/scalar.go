package httprunner

import (
	"bytes"
	"encoding/json"

	"github.com/invopop/jsonschema"
)

// Scalar is text that may be written as a number or a boolean, as in `X-Version: 2`.
type Scalar string

// UnmarshalJSON takes a string, a number or a boolean. Anything else leaves the text empty: the
// schema refuses it with its place, where an error would end the decoding and hide all that
// follows in the document.
func (s *Scalar) UnmarshalJSON(raw []byte) error {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil
	}
	switch raw[0] {
	case '"':
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return err // the decoder adds the place
		}
		*s = Scalar(text)
		return nil
	case '{', '[', 'n':
		return nil
	}
	*s = Scalar(raw)
	return nil
}

// JSONSchema is the schema of a Scalar.
func (Scalar) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{OneOf: []*jsonschema.Schema{{Type: "string"}, {Type: "number"}, {Type: "boolean"}}}
}

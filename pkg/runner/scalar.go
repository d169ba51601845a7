package runner

import (
	"bytes"
	"encoding/json"
	"errors"

	"github.com/invopop/jsonschema"
)

// Scalar is text of a configuration that may be written as a number or a boolean, too, as in
// `PORT: 8080`. Numbers stay as they are written.
type Scalar string

// UnmarshalJSON takes a string, a number or a boolean. As with a string, null leaves s alone;
// the schema refuses it.
func (s *Scalar) UnmarshalJSON(raw []byte) error {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return errors.New("empty value")
	}
	switch raw[0] {
	case '"':
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return err
		}
		*s = Scalar(text)
		return nil
	case 'n':
		return nil
	case '{', '[':
		return errors.New("must be a string, a number or a boolean")
	}
	*s = Scalar(raw)
	return nil
}

// JSONSchema is the schema of a Scalar.
func (Scalar) JSONSchema() *jsonschema.Schema {
	return &jsonschema.Schema{OneOf: []*jsonschema.Schema{{Type: "string"}, {Type: "number"}, {Type: "boolean"}}}
}

// Package jsonform writes the API's messages as the JSON that commands print: field names as
// in the protos' JSON, states in lower case, numbers as numbers, and JSON held in bytes as JSON.
package jsonform

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// Object is a JSON object whose keys keep their order.
type Object []Field

// Field is one key of an [Object].
type Field struct {
	Name  string
	Value any
}

// MarshalJSON implements json.Marshaler.
func (o Object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	for i, f := range o {
		name, err := marshal(f.Name)
		if err != nil {
			return nil, err
		}
		value, err := marshal(f.Value)
		if err != nil {
			return nil, err
		}
		b.WriteByte("{,"[min(i, 1)])
		b.Write(name)
		b.WriteByte(':')
		b.Write(value)
	}
	if len(o) == 0 {
		b.WriteByte('{')
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// marshal is json.Marshal that leaves <, > and & as they are.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("writing JSON: %w", err)
	}
	return bytes.TrimRight(b.Bytes(), "\n"), nil
}

// Write writes one JSON document, indented, and a line end.
func Write(w io.Writer, v any) error {
	raw, err := marshal(v)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	b.WriteByte('\n')
	_, err = w.Write(b.Bytes())
	return err
}

// Message is the JSON form of a message. Text, bytes and messages that are not set are left
// out; states, counts, truth values and lists are always there.
func Message(m proto.Message) (Object, error) { return object(m.ProtoReflect()) }

// Runs are runs without their jobs, as a list shows them.
func Runs(runs []*specqlv1.Run) ([]Object, error) {
	out := make([]Object, 0, len(runs))
	for _, r := range runs {
		o, err := Message(r)
		if err != nil {
			return nil, err
		}
		out = append(out, slices.DeleteFunc(o, func(f Field) bool { return f.Name == "jobs" || f.Name == "waiting" }))
	}
	return out, nil
}

func object(m protoreflect.Message) (Object, error) {
	fields := m.Descriptor().Fields()
	out := make(Object, 0, fields.Len())
	for i := range fields.Len() {
		f := fields.Get(i)
		if !m.Has(f) && (f.HasPresence() || f.Kind() == protoreflect.StringKind || f.Kind() == protoreflect.BytesKind) && !f.IsList() {
			continue
		}
		v, err := value(f, m.Get(f))
		if err != nil {
			return nil, err
		}
		out = append(out, Field{Name: f.JSONName(), Value: v})
	}
	return out, nil
}

func value(f protoreflect.FieldDescriptor, v protoreflect.Value) (any, error) {
	switch {
	case f.IsMap():
		return entries(f, v.Map())
	case !f.IsList():
		return single(f, v)
	}
	list := v.List()
	out := make([]any, 0, list.Len())
	for i := range list.Len() {
		item, err := single(f, list.Get(i))
		if err != nil {
			return nil, err
		}
		out = append(out, item)
	}
	return out, nil
}

// entries is a map, in the order of its keys.
func entries(f protoreflect.FieldDescriptor, m protoreflect.Map) (Object, error) {
	out := make(Object, 0, m.Len())
	var err error
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		var item any
		if item, err = single(f.MapValue(), v); err != nil {
			return false
		}
		out = append(out, Field{Name: k.String(), Value: item})
		return true
	})
	slices.SortFunc(out, func(a, b Field) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

func single(f protoreflect.FieldDescriptor, v protoreflect.Value) (any, error) {
	switch f.Kind() { //nolint:exhaustive // the rest are plain values
	case protoreflect.EnumKind:
		name := fmt.Sprint(v.Enum())
		if d := f.Enum().Values().ByNumber(v.Enum()); d != nil {
			// STATUS_COMPLETED of the enum Status is completed.
			name = strings.ToLower(strings.TrimPrefix(string(d.Name()), strings.ToUpper(string(f.Enum().Name()))+"_"))
		}
		return name, nil
	case protoreflect.BytesKind:
		if b := v.Bytes(); json.Valid(b) {
			return json.RawMessage(b), nil
		}
		return v.Bytes(), nil // base64
	case protoreflect.MessageKind:
		if f.Message().FullName().Parent() == "google.protobuf" {
			raw, err := protojson.Marshal(v.Message().Interface())
			if err != nil {
				return nil, fmt.Errorf("writing %s as JSON: %w", f.Name(), err)
			}
			return json.RawMessage(raw), nil
		}
		return object(v.Message())
	}
	return v.Interface(), nil
}

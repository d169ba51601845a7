package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// own is the package below which the project's protos are.
const own = "specql."

// page is api.md as it is written.
type page struct{ bytes.Buffer }

func (p *page) printf(format string, args ...any) { _, _ = fmt.Fprintf(p, format, args...) }

// apiPage writes services, messages and enums with their comments. It is an error if the
// descriptors have no comments, which a build without source info leaves out.
func apiPage(set *descriptorpb.FileDescriptorSet) ([]byte, error) {
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, fmt.Errorf("the descriptors do not fit together: %w", err)
	}
	packages := map[string][]protoreflect.FileDescriptor{}
	for _, f := range set.GetFile() {
		d, err := files.FindFileByPath(f.GetName())
		if err != nil {
			return nil, err
		}
		if name := string(d.Package()); strings.HasPrefix(name+".", own) {
			if d.SourceLocations().Len() == 0 {
				return nil, fmt.Errorf("%s has no source info, so no comments: build it with buf build", f.GetName())
			}
			packages[name] = append(packages[name], d)
		}
	}
	if len(packages) == 0 {
		return nil, errors.New("the descriptors have no package below " + strings.TrimSuffix(own, "."))
	}
	p := &page{}
	p.WriteString("# The API, message by message\n\nMade by `make generate` of the comments in `proto/`. `specql.v1` is what clients call; `specql.runner.v1` is what a\n" +
		"[runner](../runners.md) serves. gRPC's reflection answers on the orchestrator's address too.\n")
	var names []string
	for name := range packages {
		names = append(names, name)
	}
	slices.Sort(names)
	slices.Reverse(names) // v1 before runner.v1
	for _, name := range names {
		p.printf("\n- `%s`:", name)
		for _, f := range packages[name] {
			for i := range f.Services().Len() {
				p.printf(" [%s](#%s)", f.Services().Get(i).Name(), f.Services().Get(i).FullName())
			}
		}
	}
	p.WriteString("\n")
	for _, name := range names {
		p.printf("\n## Package %s\n", name)
		slices.SortFunc(packages[name], func(a, b protoreflect.FileDescriptor) int { return strings.Compare(a.Path(), b.Path()) })
		for _, f := range packages[name] {
			for i := range f.Services().Len() {
				p.service(f.Services().Get(i))
			}
		}
		for _, f := range packages[name] {
			p.types(f.Messages(), f.Enums())
		}
	}
	return p.Bytes(), nil
}

func (p *page) heading(d protoreflect.Descriptor, kind string) {
	name := strings.TrimPrefix(string(d.FullName()), string(d.ParentFile().Package())+".")
	p.printf("\n### <a id=\"%s\"></a>%s %s\n\n%s\n", d.FullName(), kind, name, comment(d))
}

func (p *page) service(s protoreflect.ServiceDescriptor) {
	p.heading(s, "Service")
	p.WriteString("\n| method | takes | gives | |\n| --- | --- | --- | --- |\n")
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		stream := map[bool]string{true: "stream of "}
		p.printf("| `%s` | %s%s | %s%s | %s |\n", m.Name(), stream[m.IsStreamingClient()], link(m.Input()), stream[m.IsStreamingServer()], link(m.Output()), cell(m))
	}
}

func (p *page) types(messages protoreflect.MessageDescriptors, enums protoreflect.EnumDescriptors) {
	for i := range messages.Len() {
		m := messages.Get(i)
		if m.IsMapEntry() {
			continue
		}
		p.heading(m, "Message")
		if m.Fields().Len() > 0 {
			p.WriteString("\n| field | number | type | |\n| --- | --- | --- | --- |\n")
		}
		for j := range m.Fields().Len() {
			f := m.Fields().Get(j)
			p.printf("| `%s` | %d | %s | %s |\n", f.Name(), f.Number(), fieldType(f), cell(f))
		}
		p.types(m.Messages(), m.Enums())
	}
	for i := range enums.Len() {
		e := enums.Get(i)
		p.heading(e, "Enum")
		p.WriteString("\n| value | number | |\n| --- | --- | --- |\n")
		for j := range e.Values().Len() {
			v := e.Values().Get(j)
			p.printf("| `%s` | %d | %s |\n", v.Name(), v.Number(), cell(v))
		}
	}
}

func fieldType(f protoreflect.FieldDescriptor) string {
	switch o := f.ContainingOneof(); {
	case f.IsMap():
		return fmt.Sprintf("map of %s to %s", single(f.MapKey()), single(f.MapValue()))
	case f.IsList():
		return "repeated " + single(f)
	case o != nil && !o.IsSynthetic():
		return fmt.Sprintf("%s, one of `%s`", single(f), o.Name())
	case f.HasOptionalKeyword():
		return "optional " + single(f)
	}
	return single(f)
}

func single(f protoreflect.FieldDescriptor) string {
	switch {
	case f.Message() != nil:
		return link(f.Message())
	case f.Enum() != nil:
		return link(f.Enum())
	}
	return f.Kind().String()
}

// link is the name of a type, which leads to it where it is on the page.
func link(d protoreflect.Descriptor) string {
	pkg := string(d.ParentFile().Package())
	if !strings.HasPrefix(pkg+".", own) {
		return string(d.FullName())
	}
	return fmt.Sprintf("[%s](#%s)", strings.TrimPrefix(string(d.FullName()), pkg+"."), d.FullName())
}

// comment is what stands before something in its proto, or else behind it in the line.
func comment(d protoreflect.Descriptor) string {
	at := d.ParentFile().SourceLocations().ByDescriptor(d)
	text := at.LeadingComments
	if strings.TrimSpace(text) == "" {
		text = at.TrailingComments
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return plain(strings.Join(lines, "\n"))
}

// cell is a comment in a table.
func cell(d protoreflect.Descriptor) string {
	return strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(comment(d), "\n\n", "<br>"), "\n", " "), "|", `\|`)
}

// plain keeps Markdown from taking text for markup, but for code in backticks.
func plain(text string) string {
	parts := strings.Split(text, "`")
	for i := range parts {
		if i%2 == 0 {
			parts[i] = strings.NewReplacer("*", `\*`, "<", "&lt;", "[", `\[`).Replace(parts[i])
		}
	}
	return strings.Join(parts, "`")
}

package ddl_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/ddl"
)

// FuzzEntity makes the SQL of whatever parses: nothing panics, and no statement holds what
// PostgreSQL's texts cannot.
func FuzzEntity(f *testing.F) {
	f.Add("entity: e\nfields:\n  a: {type: string, default: \"x'\\\\$specql$\", validation: {enum: [\"x'\\\\$specql$\"], pattern: '^(?i)x.*$'}, references: e.id}\n" +
		"  b: {type: decimal, default: \"1.5\", validation: {min: 1, max: 2}}\nindexes: [{fields: [a, b], where: \"a = 'x'\", unique: true}]\nactions: {do: {steps: []}}\n")
	f.Add("entity: e\nfields: {id: integer, o: {type: object, default: {a: [1, \"\\u0000\"]}}, t: timestamp!}\nindexes: [{fields: [created_at, o]}]\n")
	f.Fuzz(func(t *testing.T, text string) {
		e, _ := spec.ParseEntity(spec.File{Name: "e.yaml", Content: []byte(text)}, spec.Options{})
		if e == nil {
			return
		}
		tables, problems := ddl.Tables([]*spec.Entity{e}, ddl.Options{OpenReferences: true})
		functions, more := ddl.Functions([]*spec.Entity{e})
		if problems.HasErrors() || more.HasErrors() {
			return
		}
		if sql := ddl.Text(append(tables, functions...)) + ddl.Grants([]*spec.Entity{e}); strings.ContainsRune(sql, 0) {
			t.Fatalf("a NUL in %q", sql)
		}
	})
}

func FuzzPattern(f *testing.F) {
	for _, p := range []string{"^a.b$", `(?i)[^\d\s]{2,5}?|\bx\B`, `\p{Greek}+`, `[\x00-\x{10FFFF}]`, "(?sm:^.$)", "a{0}(b|)*"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, text string) {
		translated, err := ddl.Pattern(text)
		if err != nil {
			return
		}
		if _, invalid := regexp.Compile(text); invalid != nil || strings.ContainsRune(translated, 0) {
			t.Fatalf("%q became %q", text, translated)
		}
	})
}

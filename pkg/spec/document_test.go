package spec_test

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

// parsers are the three ways to read a file.
var parsers = map[string]func(f spec.File) spec.Problems{
	"registry": func(f spec.File) spec.Problems {
		r, problems := spec.ParseRegistry(f, spec.Options{LookupEnv: env(), Env: "production"})
		if r != nil {
			for _, s := range r.Services {
				s.PositionOf("operations." + s.Name + ".runner_config[0].x")
				for _, op := range s.Operations {
					op.Input.Validate(map[string]any{"a": 1.5})
				}
			}
		}
		return problems
	},
	"entity": func(f spec.File) spec.Problems {
		e, problems := spec.ParseEntity(f, spec.Options{})
		if e != nil {
			_, _ = e.NewRow(map[string]any{"status": "x"}, func() string { return "" })
		}
		return problems
	},
	"workflow": func(f spec.File) spec.Problems {
		a, problems := spec.ParseWorkflow(f, spec.Options{})
		if a != nil {
			spec.Walk(a.Steps, func(s spec.Step) bool { return s.Path() != "" })
		}
		return problems
	},
}

func documents(t testing.TB) []spec.File {
	var files []spec.File
	for _, name := range seedFiles(t, "") {
		files = append(files, readFile(t, name))
	}
	for _, name := range []string{"mistakes.yaml", "documents/entity_payment.yaml", "documents/workflow_import.yaml", "documents/registry_full.yaml"} {
		files = append(files, readFile(t, name))
	}
	return files
}

func TestFullDocumentsAreValid(t *testing.T) {
	_, problems := spec.ParseEntity(readFile(t, "documents/entity_payment.yaml"), spec.Options{Strict: true})
	require.Empty(t, problems)
	_, problems = spec.ParseWorkflow(readFile(t, "documents/workflow_import.yaml"), spec.Options{Strict: true})
	require.Empty(t, problems)
	r, problems := spec.ParseRegistry(readFile(t, "documents/registry_full.yaml"), spec.Options{Strict: true, LookupEnv: env(), Env: "production"})
	require.Empty(t, problems)
	require.Equal(t, map[string]any{"cpu_cores": 1.0, "memory_mb": int64(256), "disk_mb": int64(10)}, r.Service("data_processor").SecurityPolicy["resource_limits"])
}

// TestRandomChangesCauseNoPanic changes bytes of all documents ten thousand times and reads the results as everything.
func TestRandomChangesCauseNoPanic(t *testing.T) {
	files := documents(t)
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test that repeats
	const alphabet = "\x00\t\n :-?#&*!|>'\"%@`[]{},$.<~=0aé\xff"
	for i := range 10_000 {
		f := files[i%len(files)]
		content := append([]byte(nil), f.Content...)
		for range 1 + random.IntN(4) {
			at := random.IntN(len(content))
			switch random.IntN(4) {
			case 0:
				content[at] = byte(random.IntN(256)) //nolint:gosec // in range
			case 1:
				content[at] = alphabet[random.IntN(len(alphabet))]
			case 2:
				content = append(content[:at], content[at+1:]...)
			default:
				end := min(len(content), at+random.IntN(40))
				content = append(content[:at:at], append(append([]byte(nil), content[at:end]...), content[at:]...)...)
			}
			if len(content) == 0 {
				content = []byte{'a'}
			}
		}
		for name, parse := range parsers {
			if i%3 == 0 || len(f.Content) < 600 {
				checkProblems(t, name, parse(spec.File{Name: f.Name, Content: content}))
			}
		}
	}
}

// checkProblems checks what must hold for all problems of all inputs.
func checkProblems(t *testing.T, parser string, problems spec.Problems) {
	t.Helper()
	for _, p := range problems {
		if p.Line < 1 || p.Column < 1 || p.Message == "" || len(p.String()) > 4000 {
			t.Fatalf("%s: a problem without place or message, or a huge one: %+v", parser, p)
		}
	}
}

func fuzz(f *testing.F, parser string) {
	for _, file := range documents(f) {
		f.Add(file.Content)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		checkProblems(t, parser, parsers[parser](spec.File{Name: "fuzz.yaml", Content: content}))
	})
}

func FuzzParseRegistry(f *testing.F) { fuzz(f, "registry") }

func FuzzParseEntity(f *testing.F) { fuzz(f, "entity") }

func FuzzParseWorkflow(f *testing.F) { fuzz(f, "workflow") }

package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

// documents are all Markdown files of the repository, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != root:
			return fs.SkipDir
		case filepath.Ext(path) == ".md":
			raw, err := os.ReadFile(path)
			found[path] = string(raw)
			return err
		}
		return nil
	})
	require.NoError(t, err)
	require.NotEmpty(t, found)
	return found
}

var (
	link  = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	code  = regexp.MustCompile("(?s)```.*?```|`[^`]*`")
	fence = regexp.MustCompile("(?s)```yaml\n(.*?)```")
	// comments stand before what a block is; registry begins one.
	comments = regexp.MustCompile(`^(#.*\n)+`)
	registry = regexp.MustCompile(`^(services|development|production):`)
)

// pager is a registry with the service that the documents' alerts notify.
const pager = `services:
  - name: pager
    type: notification
    category: communication
    runner_config: {base_url: "https://pager.example.com"}
    operations: [{name: page}]
`

func TestLinksLeadSomewhere(t *testing.T) {
	for path, text := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(code.ReplaceAllString(text, ""), -1) {
			_, err := os.Stat(filepath.Join(filepath.Dir(path), m[1]))
			require.NoError(t, err, "%s links to %s", path, m[1])
		}
	}
}

// Every YAML block of the documentation is what it says.
func TestDocumentedYAMLIsValid(t *testing.T) {
	checked := 0
	for path, text := range documents(t) {
		for _, m := range fence.FindAllStringSubmatch(text, -1) {
			block := m[1]
			file := spec.File{Name: path, Content: []byte(block)}
			var problems spec.Problems
			begins := comments.ReplaceAllString(block, "")
			switch {
			case registry.MatchString(begins), strings.HasPrefix(begins, "alerts:"):
				if strings.HasPrefix(begins, "alerts:") {
					// The registry beside which alerts stand has the service that they notify.
					file.Content = []byte(pager + block)
				}
				name := filepath.Join(t.TempDir(), "registry.yaml")
				require.NoError(t, os.WriteFile(name, file.Content, 0o600))
				for _, env := range []string{"", "development"} {
					status, out, errs := run(t, "", []string{"SPECQL_ENV=" + env}, "validate-config", name)
					require.Zero(t, status, "%s: %s%s", path, out, errs)
					if !strings.Contains(block, "\ndevelopment:") {
						break
					}
				}
			case strings.HasPrefix(begins, "entity:"):
				_, problems = spec.ParseEntity(file, spec.Options{})
			case strings.HasPrefix(begins, "- "):
				// Steps alone; those that stand empty in them show where others go.
				file.Content = []byte("actions:\n" + regexp.MustCompile(`(then|else|do|branches): \[\]`).ReplaceAllString(block, "$1: [{wait: {seconds: 1}}]"))
				_, problems = spec.ParseWorkflow(file, spec.Options{})
			default:
				_, problems = spec.ParseWorkflow(file, spec.Options{})
			}
			require.Empty(t, problems, "%s\n%s", path, block)
			checked++
		}
	}
	require.Positive(t, checked)
}

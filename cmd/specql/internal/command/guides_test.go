package command

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

var guides = []string{
	"../../../../docs/guides/MULTI_EXECUTION_MIGRATION.md",
	"../../../../docs/troubleshooting/MULTI_EXECUTION_TROUBLESHOOTING.md",
}

// offline are the commands that need neither a server nor a database.
var offline = []string{"validate-config", "migration-check", "certs", "--version"}

var (
	fence  = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")
	inline = regexp.MustCompile("`(specql [^`]+)`")
	word   = regexp.MustCompile(`'[^']*'|"[^"]*"|\S+`)
)

// guide is one of the guides: its blocks by language, and the specql command lines in blocks and in the text.
type guide struct {
	blocks   map[string][]string
	commands [][]string
}

func readGuide(t *testing.T, name string) guide {
	t.Helper()
	raw, err := os.ReadFile(name)
	require.NoError(t, err)
	g := guide{blocks: map[string][]string{}}
	add := func(line string) {
		words := word.FindAllString(line, -1)
		for i, w := range words {
			words[i] = strings.Trim(w, `'"`)
		}
		g.commands = append(g.commands, words[1:])
	}
	text := string(raw)
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		g.blocks[m[1]] = append(g.blocks[m[1]], m[2])
		if m[1] != "bash" {
			continue
		}
		for line := range strings.Lines(m[2]) {
			if strings.HasPrefix(line, "specql ") {
				add(line)
			}
		}
	}
	for _, m := range inline.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		add(m[1])
	}
	return g
}

func guideIO(out, errs *bytes.Buffer) IO {
	return IO{
		In: strings.NewReader(""), Out: out, Err: errs, Version: "1.2.3",
		LookupEnv: func(string) (string, bool) { return "", false },
	}
}

// Every command of the guides exists, with its flags. One that is complete has the arguments that it needs.
func TestGuideCommandsExist(t *testing.T) {
	t.Parallel()
	for _, name := range guides {
		g := readGuide(t, name)
		require.Greater(t, len(g.commands), 15, name)
		for _, args := range g.commands {
			line := filepath.Base(name) + ": specql " + strings.Join(args, " ")
			var out, errs bytes.Buffer
			root := newRoot(guideIO(&out, &errs))
			root.InitDefaultVersionFlag()
			cmd, rest, err := root.Find(spread(args))
			require.NoError(t, err, line)
			if cmd == root {
				require.Equal(t, []string{"--version"}, args, line)
				continue
			}
			require.True(t, cmd.Runnable() || len(rest) == 0, line)
			cmd.InitDefaultHelpFlag()
			var missing *pflag.ValueRequiredError
			err = cmd.ParseFlags(rest)
			if mention := len(args) <= 2 || args[len(args)-1] == "--disable"; mention && err != nil {
				// `specql execution-types --disable` names the flag, in a sentence.
				require.ErrorAs(t, err, &missing, line)
				continue
			}
			require.NoError(t, err, line)
			if positional := cmd.Flags().Args(); len(positional) > 0 {
				require.NoError(t, cmd.ValidateArgs(positional), line)
			}
		}
	}
}

// What needs no server is run, in the order of the guide, on the registry that the guide itself shows.
func TestGuideCommandsRun(t *testing.T) {
	for _, name := range guides {
		t.Run(filepath.Base(name), func(t *testing.T) {
			g := readGuide(t, name)
			migration := readGuide(t, guides[0])
			before, after := "", ""
			for _, block := range migration.blocks["yaml"] {
				switch first, rest, _ := strings.Cut(block, "\n"); {
				case strings.HasSuffix(first, ", before"):
					before = rest
				case strings.HasSuffix(first, ", after"):
					after = rest
				}
			}
			require.NotEmpty(t, before)
			t.Chdir(t.TempDir())
			require.NoError(t, os.Mkdir("registry", 0o750))
			const registry = "registry/service_registry.yaml"
			overlay := "production:\n  services:\n    - name: stripe_api\n      runner_config: {base_url: \"https://api.stripe.com/v1\"}\n"
			ran := 0
			for _, args := range g.commands {
				runnable := false
				for _, o := range offline {
					runnable = runnable || args[0] == o
				}
				if !runnable || len(args) == 1 && args[0] != "--version" {
					continue
				}
				line := "specql " + strings.Join(args, " ")
				content := before
				if strings.Contains(line, "--env production") {
					content = before + overlay
				}
				require.NoError(t, os.WriteFile(registry, []byte(content), 0o600))
				var out, errs bytes.Buffer
				require.Equal(t, Done, Execute(t.Context(), guideIO(&out, &errs), args), "%s\n%s%s", line, out.String(), errs.String())
				ran++
				if strings.Contains(line, "--fix") {
					got, err := os.ReadFile(registry)
					require.NoError(t, err)
					require.Equal(t, after, string(got), "the guide shows what --fix makes of it")
				}
			}
			require.GreaterOrEqual(t, ran, 4)
		})
	}
}

// The registries and workflows of the guides are valid.
func TestGuideYAML(t *testing.T) {
	t.Parallel()
	for _, name := range guides {
		for _, block := range readGuide(t, name).blocks["yaml"] {
			f := spec.File{Name: filepath.Base(name), Content: []byte(block)}
			var problems spec.Problems
			if strings.Contains(block, "\nactions:") {
				_, problems = spec.ParseWorkflow(f, spec.Options{Strict: true})
			} else {
				_, problems = spec.ParseRegistry(f, spec.Options{Strict: true, LookupEnv: func(string) (string, bool) { return "", false }})
			}
			require.Empty(t, problems, block)
		}
	}
}

var link = regexp.MustCompile(`\]\(([^)#\s]*)(#[^)\s]+)?\)`)

// Links lead to files and headings that are there.
func TestGuideLinks(t *testing.T) {
	t.Parallel()
	heading := regexp.MustCompile(`(?m)^#+ (.+)$`)
	drop := regexp.MustCompile(`[^a-z0-9 _-]`)
	for _, name := range guides {
		raw, err := os.ReadFile(name)
		require.NoError(t, err)
		links := link.FindAllStringSubmatch(string(raw), -1)
		require.NotEmpty(t, links)
		for _, m := range links {
			target := name
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(name), m[1])
			}
			text, err := os.ReadFile(target)
			require.NoError(t, err, m[0])
			if m[2] == "" {
				continue
			}
			var anchors []string
			for _, h := range heading.FindAllStringSubmatch(string(text), -1) {
				anchors = append(anchors, "#"+strings.ReplaceAll(drop.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-"))
			}
			require.Contains(t, anchors, m[2], m[0])
		}
	}
}

package command

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// Reference writes every command with its usage, flags and defaults, as Markdown.
func Reference(w io.Writer) error {
	root := newRoot(IO{In: strings.NewReader(""), Out: io.Discard, Err: io.Discard, LookupEnv: func(string) (string, bool) { return "", false }, Version: "reference"})
	var b strings.Builder
	b.WriteString("# Every command and flag\n\nMade by `make generate` of what `specql COMMAND --help` prints. [cli.md](cli.md) explains the commands.\n" +
		"A flag that is not given takes the value of the variable that stands with it, such as `SPECQL_ADDRESS`.\n\n")
	var commands []*cobra.Command
	for _, c := range descendants(root) {
		if c.IsAvailableCommand() || c == root {
			commands = append(commands, c)
		}
	}
	for _, c := range commands {
		fmt.Fprintf(&b, "- [`%s`](#%s): %s\n", c.CommandPath(), strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
	}
	for _, c := range commands {
		// Without --help and --version, which are everybody's.
		flags := strings.TrimRight(c.LocalFlags().FlagUsages(), "\n")
		fmt.Fprintf(&b, "\n## %s\n", c.CommandPath())
		text := c.Long
		if text == "" {
			text = c.Short + "."
		}
		block(&b, "", strings.TrimSpace(text))
		if c.Runnable() {
			block(&b, "Usage:", "  "+c.UseLine())
		} else {
			block(&b, "Usage:", "  "+c.CommandPath()+" COMMAND")
		}
		block(&b, "Flags:", flags)
		block(&b, "For example:", strings.TrimRight(c.Example, "\n"))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// block writes text as it is in the terminal.
func block(b *strings.Builder, title, text string) {
	if text == "" {
		return
	}
	if title != "" {
		b.WriteString("\n" + title + "\n")
	}
	b.WriteString("\n```text\n" + text + "\n```\n")
}

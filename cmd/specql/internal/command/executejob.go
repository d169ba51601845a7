package command

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

func newExecuteJob(s IO) *cobra.Command {
	var (
		conn         connection
		out          output
		a            client.Action
		input, file  string
		detach, hush bool
	)
	cmd := &cobra.Command{
		Use:   "execute-job (--entity E --action A | --file workflow.yaml)",
		Short: "Starts a run, follows it and prints the result",
		Long: "Starts an action of an entity, or a workflow from a file, follows it and prints the result.\n" +
			"Progress and the jobs' log lines go to standard error, the result to standard output.\n" +
			"Ctrl-C cancels the run and waits for its end; a second Ctrl-C leaves at once.",
		Example: "  specql execute-job --entity payment --action process_payment --input '{\"amount_cents\": 1200}'\n" +
			"  specql execute-job --file workflow.yaml --input @input.json -o json",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			switch {
			case file != "" && (a.Entity != "" || a.Action != "" || a.EntityID != ""):
				return misuse("--file is a workflow of its own: leave out --entity, --action and --id")
			case file == "" && (a.Entity == "" || a.Action == ""):
				return misuse("what to run? Give --entity and --action, or --file")
			case file != "":
				raw, err := readFile(file)
				if err != nil {
					return misuse("--file: %w", err)
				}
				if len(bytes.TrimSpace(raw)) == 0 {
					return misuse("--file: %s is empty; a workflow has a list of steps under actions:", file)
				}
				a.Workflow = string(raw)
			}
			raw, err := s.readJSON("input", input)
			if err != nil {
				return err
			}
			if raw != nil {
				a.Input = raw
			}
			c, err := conn.dial(s)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			return inFile(file, execute(cmd.Context(), s, c, &conn, a, &out, detach, hush))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&a.Entity, "entity", "", "the entity")
	fs.StringVar(&a.Action, "action", "", "the entity's action")
	fs.StringVar(&file, "file", "", "a workflow of its own, in place of an entity's action")
	fs.StringVar(&input, "input", "", "the input: JSON, @FILE, or - for standard input")
	fs.StringVar(&a.EntityID, "id", "", "primary key of the entity's row; a new row without it")
	fs.StringVar(&a.IdempotencyKey, "idempotency-key", "", "two starts with one key are one run")
	fs.StringVar(&a.CorrelationID, "correlation-id", "", "your own id for what the run belongs to")
	fs.BoolVar(&detach, "detach", false, "print the run's id and leave it running")
	fs.BoolVarP(&hush, "quiet", "q", false, "show no progress and no log lines")
	conn.register(fs)
	out.register(fs)
	return cmd
}

// inFile gives the problems of a workflow the name of its file, which the server does not know.
func inFile(name string, err error) error {
	f, ok := fault.As(err)
	if !ok || name == "" || f.Code != fault.Validation {
		return err
	}
	named := *f
	rename := func(text string) string {
		if rest, ok := strings.CutPrefix(text, "workflow:"); ok {
			return name + ":" + rest
		}
		return text
	}
	named.Message = rename(f.Message)
	named.Violations = slices.Clone(f.Violations)
	for i, v := range named.Violations {
		if v.Field == "workflow" {
			// A problem says its place; all else is about the file as a whole.
			named.Violations[i] = fault.Violation{Field: name, Description: v.Description}
			if place := rename(v.Description); place != v.Description {
				named.Violations[i] = fault.Violation{Description: place}
			}
		}
	}
	return &named
}

func execute(ctx context.Context, s IO, c *client.Client, conn *connection, a client.Action, out *output, detach, hush bool) error {
	run, err := c.Execute(ctx, a)
	if err != nil {
		return conn.explain(err)
	}
	if detach {
		return s.printStarted(out, run)
	}
	run, err = follow(ctx, s, c, run, hush)
	if err != nil {
		return conn.explain(err)
	}
	return s.printResult(out, run, hush)
}

package command

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// maxListed is how many runs a page has at most.
const maxListed = 1000

func newRuns(s IO) *cobra.Command {
	cmd := &cobra.Command{Use: "runs", Short: "Lists, shows and steers runs", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(newRunsList(s), newRunsShow(s), newRunsLogs(s), newRunsCancel(s), newRunsRetry(s), newRunsSignal(s))
	return cmd
}

// withClient makes a command that talks to a server about what its arguments name.
func withClient(s IO, cmd *cobra.Command, do func(cmd *cobra.Command, c *client.Client, conn *connection, out *output, args []string) error) *cobra.Command {
	var conn connection
	var out output
	conn.register(cmd.Flags())
	out.register(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := out.check(); err != nil {
			return err
		}
		c, err := conn.dial(s)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		return conn.explain(do(cmd, c, &conn, &out, args))
	}
	return cmd
}

func newRunsList(s IO) *cobra.Command {
	var req specqlv1.ListRunsRequest
	var statuses []string
	cmd := &cobra.Command{Use: "list", Short: "Lists runs, newest first", Args: cobra.NoArgs}
	fs := cmd.Flags()
	fs.StringSliceVar(&statuses, "status", nil, "only runs in this state: pending, running, completed, failed or cancelled (repeatable)")
	fs.StringVar(&req.Entity, "entity", "", "only runs of this entity")
	fs.StringVar(&req.Action, "action", "", "only runs of this action")
	fs.Int32Var(&req.PageSize, "limit", 50, "at most so many, up to 1,000")
	fs.StringVar(&req.PageToken, "page", "", "nextPageToken of the page before")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		if req.GetPageSize() < 1 || req.GetPageSize() > maxListed {
			return misuse("--limit must be between 1 and %d", maxListed)
		}
		for _, name := range statuses {
			n, ok := specqlv1.Status_value["STATUS_"+strings.ToUpper(name)]
			if !ok || n == 0 {
				return misuse("--status %q is not known: use pending, running, completed, failed or cancelled", name)
			}
			req.Statuses = append(req.Statuses, specqlv1.Status(n))
		}
		runs, next, err := c.List(cmd.Context(), &req)
		if f, ok := fault.As(err); ok && len(f.Violations) == 1 && f.Violations[0].Field == "page_token" {
			return misuse("--page %q is not the nextPageToken of a page before", req.GetPageToken())
		}
		if err != nil {
			return err
		}
		if out.json() {
			list, err := jsonform.Runs(runs)
			if err != nil {
				return err
			}
			return s.print(jsonform.Object{{Name: "runs", Value: list}, {Name: "nextPageToken", Value: next}})
		}
		table := tree.Table{Head: []string{"ID", "ACTION", "STATUS", "STARTED", "DURATION", "ERROR"}, Right: map[int]bool{4: true}}
		for _, r := range runs {
			table.Rows = append(table.Rows, runRow(r))
		}
		return s.lines(table.Lines(s.out()), next)
	})
}

func runRow(r *specqlv1.Run) []string {
	started, took, failure := tree.Absent, tree.Absent, ""
	if t := r.GetStartedAt(); t != nil {
		started = t.AsTime().Local().Format(time.DateTime)
		if e := r.GetCompletedAt(); e != nil {
			took = tree.FormatDuration(e.AsTime().Sub(t.AsTime()))
		}
	}
	if e := r.GetError(); e != nil {
		failure = terminal.Cut(e.GetCode()+": "+e.GetMessage(), 80)
	}
	return []string{r.GetId(), tree.Name(r), tree.StatusText(r.GetStatus()), started, took, failure}
}

// lines prints lines, and how to go on where there is more.
func (s IO) lines(lines []string, next string) error {
	if _, err := fmt.Fprintln(s.Out, strings.Join(lines, "\n")); err != nil {
		return err
	}
	if next != "" {
		s.say("There are more: --page %s", terminal.Clean(next))
	}
	return nil
}

func newRunsShow(s IO) *cobra.Command {
	cmd := &cobra.Command{Use: "show ID", Short: "Shows a run with its jobs and what they used", Args: cobra.ExactArgs(1)}
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		run, err := c.Get(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if out.json() {
			return s.printRun(run)
		}
		screen := s.out()
		screen.Live = false
		width, _ := screen.Size()
		model := tree.New(run)
		lines := append([]string{"run " + terminal.Clean(run.GetId())}, model.Render(tree.View{Screen: screen, Width: width, Now: time.Now()})...)
		if e := run.GetError(); e != nil {
			lines = append(lines, screen.Paint(terminal.Red, terminal.Clean(e.GetCode()+": "+e.GetMessage())))
		}
		if jobs := model.Jobs(); len(jobs) > 0 {
			lines = append(append(lines, ""), tree.Usage(jobs).Lines(screen)...)
		}
		if v := run.GetOutput(); v != nil {
			lines = append(lines, "", "output:", indented(v))
		}
		return s.lines(lines, "")
	})
}

func newRunsLogs(s IO) *cobra.Command {
	cmd := &cobra.Command{
		Use: "logs ID", Short: "Prints the lines that a run's jobs wrote, and goes on until the run has ended", Args: cobra.ExactArgs(1),
	}
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		lines := []jsonform.Object{}
		run, err := c.Get(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		p := &progress{s: s, screen: s.out(), names: names(run)}
		err = c.Watch(cmd.Context(), args[0], func(e *client.Event) error {
			if j := e.GetJob(); j != nil {
				p.names[j.GetId()] = j.GetService() + "." + j.GetOperation()
			}
			l := e.GetLog()
			if l == nil {
				return nil
			}
			if !out.json() {
				_, err := fmt.Fprintln(s.Out, p.logLine(l))
				return err
			}
			o, err := jsonform.Message(l)
			lines = append(lines, o)
			return err
		}, client.WithLogs())
		if err != nil || !out.json() {
			return err
		}
		return s.print(jsonform.Object{{Name: "id", Value: args[0]}, {Name: "lines", Value: lines}})
	})
}

func newRunsCancel(s IO) *cobra.Command {
	var reason string
	cmd := &cobra.Command{Use: "cancel ID", Short: "Ends a run; returns when everything that it started is gone", Args: cobra.ExactArgs(1)}
	cmd.Flags().StringVar(&reason, "reason", "", "why; kept in the run's error")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		run, err := c.Cancel(cmd.Context(), args[0], reason)
		if err != nil {
			return err
		}
		return s.printState(out, run)
	})
}

func newRunsRetry(s IO) *cobra.Command {
	var detach, hush bool
	cmd := &cobra.Command{Use: "retry ID", Short: "Goes on with a failed or cancelled run from the step that failed, and follows it", Args: cobra.ExactArgs(1)}
	cmd.Flags().BoolVar(&detach, "detach", false, "leave the run running")
	cmd.Flags().BoolVarP(&hush, "quiet", "q", false, "show no progress and no log lines")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		run, err := c.Retry(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if detach {
			return s.printStarted(out, run)
		}
		if run, err = follow(cmd.Context(), s, c, run, hush); err != nil {
			return err
		}
		return s.printResult(out, run, hush)
	})
}

func newRunsSignal(s IO) *cobra.Command {
	var payload string
	cmd := &cobra.Command{Use: "signal ID NAME", Short: "Delivers a signal that a run awaits or will await", Args: cobra.ExactArgs(2)}
	cmd.Flags().StringVar(&payload, "payload", "", "what the await_signal gives as its result: JSON, @FILE, or - for standard input")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		raw, err := s.readJSON("payload", payload)
		if err != nil {
			return err
		}
		var value any
		if raw != nil {
			value = raw
		}
		run, err := c.Signal(cmd.Context(), args[0], args[1], value)
		if err != nil {
			return err
		}
		return s.printState(out, run)
	})
}

// printState prints a run's state; whatever it is, the command did its work.
func (s IO) printState(out *output, run *specqlv1.Run) error {
	if out.json() {
		return s.printRun(run)
	}
	row := runRow(run)
	_, err := fmt.Fprintln(s.Out, terminal.Clean(strings.Join(slices.DeleteFunc([]string{"run", row[0], row[2]}, func(t string) bool { return t == "" }), " ")))
	return err
}

package command

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// printRun prints a run as JSON.
func (s IO) printRun(run *specqlv1.Run) error {
	doc, err := jsonform.Message(run)
	if err != nil {
		return err
	}
	return s.print(doc)
}

// printStarted prints a run that is left to itself.
func (s IO) printStarted(out *output, run *specqlv1.Run) error {
	if out.json() {
		return s.printRun(run)
	}
	_, err := fmt.Fprintln(s.Out, terminal.Clean(run.GetId()))
	return err
}

// printResult prints the result of a run that has ended on standard output, and on standard
// error how it ended; one that did not complete is status 1.
func (s IO) printResult(out *output, run *specqlv1.Run, hush bool) error {
	var err error
	if out.json() {
		if !hush && !s.err().Live {
			s.conclude(run)
		}
		err = s.printRun(run)
	} else {
		s.conclude(run)
		if v := run.GetOutput(); v != nil {
			_, err = fmt.Fprintln(s.Out, indented(v))
		}
	}
	if err == nil && run.GetStatus() != specqlv1.Status_STATUS_COMPLETED {
		return errShown
	}
	return err
}

// conclude says in one line how a run ended.
func (s IO) conclude(run *specqlv1.Run) {
	line := fmt.Sprintf("run %s %s", terminal.Clean(run.GetId()), tree.StatusText(run.GetStatus()))
	if d := run.GetCompletedAt().AsTime().Sub(run.GetStartedAt().AsTime()); run.GetStartedAt() != nil && run.GetCompletedAt() != nil {
		line += " in " + tree.FormatDuration(d)
	}
	if e := run.GetError(); e != nil {
		line += ": " + terminal.Clean(e.GetCode()+": "+e.GetMessage())
	}
	style := terminal.Green
	if run.GetStatus() != specqlv1.Status_STATUS_COMPLETED {
		style = terminal.Red
	}
	s.say("%s", s.err().Paint(style, line))
}

// indented is a value as JSON for people. JSON escapes C0 controls by itself; Clean does the rest.
func indented(v *structpb.Value) string {
	raw, err := protojson.Marshal(v)
	if err != nil {
		return terminal.Clean(err.Error())
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return terminal.Clean(string(raw))
	}
	lines := strings.Split(b.String(), "\n")
	for i, l := range lines {
		lines[i] = terminal.Clean(l)
	}
	return strings.Join(lines, "\n")
}

package command

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// frame is how often a tree is drawn again.
const frame = 100 * time.Millisecond

// maxLogWidth is how much of a log line is shown while a run is followed; specql runs logs
// shows all of it.
const maxLogWidth = 240

// follow shows a run on standard error until it has ended, and returns it with its jobs.
// The first interrupt cancels the run, the second leaves.
func follow(ctx context.Context, s IO, c *client.Client, run *specqlv1.Run, hush bool) (*specqlv1.Run, error) {
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupts)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	events := make(chan *specqlv1.WatchRunResponse, 256)
	watched := make(chan error, 1)
	go func() {
		var opts []client.WatchOption
		if !hush {
			opts = append(opts, client.WithLogs())
		}
		err := c.Watch(ctx, run.GetId(), func(e *client.Event) error {
			select {
			case events <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}, opts...)
		close(events)
		watched <- err
	}()

	p := newProgress(s, run, hush)
	defer p.finish()
	ticker := time.NewTicker(frame)
	defer ticker.Stop()
	cancelled := make(chan error, 1)
	asked := false
	for {
		select {
		case e, ok := <-events:
			if !ok {
				if err := <-watched; err != nil {
					return nil, fmt.Errorf("the run %s goes on without being watched: %w", run.GetId(), err)
				}
				end, err := c.Get(ctx, run.GetId())
				if err != nil {
					return nil, err
				}
				p.model.SetRun(end)
				return end, nil
			}
			p.event(e)
		case <-ticker.C:
			p.draw()
		case err := <-cancelled:
			if f, ok := fault.As(err); ok && f.Code != fault.Validation && f.Code != fault.Disabled {
				return nil, fmt.Errorf("the run could not be cancelled: %w", err)
			}
		case <-interrupts:
			if asked {
				p.note("leaving; follow the run with: specql runs show " + run.GetId())
				return nil, errShown
			}
			asked = true
			p.note("cancelling the run and waiting for its end; Ctrl-C again leaves at once")
			go func() {
				_, err := c.Cancel(ctx, run.GetId(), "interrupted at the terminal")
				cancelled <- err
			}()
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// progress shows a run's changes: as a tree that is drawn in place on a terminal, else line by line.
type progress struct {
	s      IO
	screen terminal.Screen
	model  *tree.Model
	live   *terminal.Live
	hush   bool
	above  []string
	names  map[string]string // a job's name by its id
	// begun: the line that the run is running has been shown.
	begun bool
	// logWidth is how many cells of a log line are shown; 0 for all.
	logWidth int
}

func newProgress(s IO, run *specqlv1.Run, hush bool) *progress {
	p := &progress{s: s, screen: s.err(), model: tree.New(run), hush: hush, names: names(run), logWidth: maxLogWidth}
	if p.screen.Live && !hush {
		p.live = terminal.NewLive(s.Err, p.screen)
		width, _ := p.screen.Size()
		p.logWidth = min(width-1, maxLogWidth)
	}
	return p
}

// names of a run's jobs by their ids.
func names(run *specqlv1.Run) map[string]string {
	out := map[string]string{}
	for _, j := range run.GetJobs() {
		out[j.GetId()] = j.GetService() + "." + j.GetOperation()
	}
	return out
}

func (p *progress) event(e *specqlv1.WatchRunResponse) {
	p.model.Apply(e)
	if p.hush {
		return
	}
	if j := e.GetJob(); j != nil {
		p.names[j.GetId()] = j.GetService() + "." + j.GetOperation()
	}
	if l := e.GetLog(); l != nil {
		p.begin()
		p.note(p.logLine(l))
		return
	}
	if p.live != nil {
		return
	}
	switch run := e.GetRun(); {
	case run == nil:
		p.begin()
		if text := tree.Line(e, time.Now()); text != "" {
			p.note(text)
		}
	case run.GetStatus() == specqlv1.Status_STATUS_RUNNING:
		p.begin()
	}
}

// begin says once that the run is running, before anything of its steps: a first step may be
// told before its run. How the run ended is told by whoever follows it.
func (p *progress) begin() {
	if p.begun || p.live != nil {
		return
	}
	p.begun = true
	run := p.model.Run()
	p.note(terminal.Clean("run " + run.GetId() + " " + tree.Name(run) + " " + tree.StatusText(specqlv1.Status_STATUS_RUNNING)))
}

func (p *progress) logLine(l *specqlv1.LogLine) string {
	name := p.names[l.GetJobId()]
	if name == "" {
		name = l.GetStepPath()
	}
	text := terminal.Clean(name + " | " + l.GetText())
	if p.logWidth > 0 {
		text = terminal.Cut(text, p.logWidth)
	}
	if l.GetStream() == "stderr" {
		return p.screen.Paint(terminal.Yellow, text)
	}
	return p.screen.Paint(terminal.Dim, text)
}

// note shows a line that stays. It must be clean.
func (p *progress) note(text string) {
	if p.live == nil {
		p.s.say("%s", text)
		return
	}
	p.above = append(p.above, text)
}

func (p *progress) draw() {
	if p.live == nil {
		return
	}
	_ = p.live.Draw(p.above, p.lines())
	p.above = p.above[:0]
}

func (p *progress) finish() {
	if p.live == nil {
		return
	}
	_ = p.live.Finish(p.above, p.lines())
	p.above = nil
}

func (p *progress) lines() []string {
	width, _ := p.screen.Size()
	return p.model.Render(tree.View{Screen: p.screen, Width: width, Now: time.Now()})
}

//go:build linux

// Command sandbox measures what a sandbox adds to the start of a program: the time from
// before /bin/true is started until it has ended and no process of it is left, bare, through the
// shell runner's sandbox, through a whole job of the shell runner, and through bwrap and docker
// run where they are there.
package main

import (
	"archive/tar"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"text/tabwriter"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
	"github.com/specql/mesh/services/shell-runner/shellrunner"
)

const (
	program = "/bin/true"
	// endNow has this program end at once: it is what a container runs.
	endNow = "end-now"
	image  = "specql-bench-sandbox:1"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == endNow {
		return
	}
	n := flag.Int("n", 300, "how often each is started; docker a tenth as often")
	flag.Parse()
	if err := run(context.Background(), *n, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		os.Exit(1)
	}
}

// way is one way to start a program.
type way struct {
	name  string
	start func() error
	every int // of how many rounds it takes part in one
	took  []time.Duration
}

func run(ctx context.Context, n int, out io.Writer) (err error) {
	temp, err := os.MkdirTemp("", "bench-sandbox-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	box, err := sandbox.New(sandbox.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer box.Close()
	shell, err := shellrunner.New(shellrunner.Options{TempDir: temp})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, shell.Close()) }()
	ways := []*way{
		{name: "fork+exec", start: command(ctx, program)},
		{name: "sandbox", start: func() error { return inSandbox(box, temp) }},
		{name: "job of the shell runner, with control groups", start: func() error { return job(ctx, shell) }},
	}
	if path, err := exec.LookPath("bwrap"); err == nil {
		ways = append(ways, &way{name: "bwrap --unshare-all", start: command(
			ctx, path, "--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64",
			"--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", program,
		)})
	}
	if err := makeImage(ctx); err == nil {
		defer func() { _ = exec.CommandContext(ctx, "docker", "rmi", "-f", image).Run() }()
		ways = append(ways, &way{name: "docker run --rm --network none", every: 10, start: command(ctx, "docker", "run", "--rm", "--network", "none", image, "/bench", endNow)})
	} else {
		_, _ = fmt.Fprintf(out, "docker is left out: %v\n", err)
	}
	if err := rounds(ways, n); err != nil {
		return err
	}
	return report(out, ways)
}

// rounds starts each in turn, so that what else the machine does falls on all alike, with a
// pause in which launchers can be made ready, as there is between the jobs of a runner.
func rounds(ways []*way, n int) error {
	const pause = 15 * time.Millisecond
	for i := range n {
		for _, w := range ways {
			if w.every > 0 && i%w.every != 0 {
				continue
			}
			begin := time.Now()
			if err := w.start(); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			w.took = append(w.took, time.Since(begin))
			<-time.After(pause)
		}
	}
	return nil
}

func report(out io.Writer, ways []*way) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "ms\tstarts\tleast\tmedian\t90 %\tmedian over fork+exec")
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	var bare time.Duration
	for i, w := range ways {
		slices.Sort(w.took)
		median := w.took[len(w.took)/2]
		if i == 0 {
			bare = median
		}
		_, _ = fmt.Fprintf(table, "%s\t%d\t%.2f\t%.2f\t%.2f\t%.2f\n", w.name, len(w.took), ms(w.took[0]), ms(median), ms(w.took[len(w.took)*9/10]), ms(median-bare))
	}
	return table.Flush()
}

func command(ctx context.Context, name string, args ...string) func() error {
	return func() error { return exec.CommandContext(ctx, name, args...).Run() } //nolint:gosec // of this program
}

func inSandbox(box *sandbox.Sandbox, temp string) (err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, null.Close()) }()
	real := "/usr" + program
	p, err := box.Start(&sandbox.Job{
		Path: real, Argv: []string{program}, Private: temp, TempBytes: 16 << 20, Programs: []sandbox.Program{{Listed: program, Path: real}}, Network: sandbox.NoNetwork,
		Stdin: null, Stdout: null, Stderr: null,
	})
	if err != nil {
		return err
	}
	if state := p.Wait(); state.Status != 0 {
		return fmt.Errorf("it ended with %v", state.Status)
	}
	return nil
}

func job(ctx context.Context, shell *shellrunner.Runner) error {
	result, err := shell.Execute(ctx, &runner.Job{
		ID: "bench", Service: runner.Service{Policy: []byte(`{"allowed_commands":["/bin/true"],"resource_limits":{"cpu_cores":1,"memory_mb":64,"processes":8,"disk_mb":16}}`)},
		Operation: runner.Operation{Config: []byte(`{"command":["/bin/true"]}`)},
	}, discard{})
	if err != nil {
		return err
	}
	return result.Err
}

// discard is a sink that nobody reads.
type discard struct{}

func (discard) Log(string, string)            {}
func (discard) Usage(*runnerv1.ResourceUsage) {}
func (discard) Secret(string)                 {}

// makeImage makes an image with this program in it. It must be built without cgo.
func makeImage(ctx context.Context) (err error) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "docker", "import", "-", image)
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	w := tar.NewWriter(in)
	if err := w.WriteHeader(&tar.Header{Name: "bench", Mode: 0o755, Size: int64(len(self))}); err == nil {
		_, _ = w.Write(self) // docker says what is wrong
	}
	_, _ = w.Close(), in.Close()
	return cmd.Wait()
}

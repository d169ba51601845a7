package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
)

func newDemo(s IO) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Starts the mesh, runs the examples end to end and shows what each step used",
		Long: "Starts the mesh with the bundled examples on free ports and a temporary database, runs a workflow of all\n" +
			"execution types, and ends with a table of what each step used. Needs no network. Leaves nothing behind but\n" +
			"the small Docker image " + local.Image + ".",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			return demo(ctx, s, &out)
		},
	}
	out.register(cmd.Flags())
	return cmd
}

func demo(ctx context.Context, s IO, out *output) (err error) {
	data, err := os.MkdirTemp("", "specql-demo-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(data) }()
	documents, err := local.Examples(data)
	if err != nil {
		return err
	}
	box, endpoints, err := local.Prepare(documents)
	if box != nil {
		defer func() { _ = box.Close() }()
	}
	if err != nil {
		return err
	}
	workflow, err := local.Workflow("demo.yaml")
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	// The image is built while the mesh starts.
	image := make(chan error, 1)
	go func() { image <- local.BuildImage(ctx) }()
	ready := make(chan local.Ready, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- local.Run(ctx, local.Options{
			Registry: documents.Registry, Entities: documents.Entities, Env: documents.Env,
			Data: data, Listen: "127.0.0.1:0", Console: "127.0.0.1:0",
			DrainTimeout: 2 * time.Second, Logger: telemetry.NewLogger(s.Err, "error", "text"), Version: s.Version,
		}, func(r local.Ready) { ready <- r })
	}()
	stopped := false
	defer func() {
		stop()
		if !stopped {
			if runErr := <-ended; err == nil {
				err = runErr
			}
		}
	}()
	noImage := <-image
	var at local.Ready
	select {
	case at = <-ready:
	case runErr := <-ended:
		stopped = true
		return s.invalid(runErr)
	}
	s.say("The mesh runs: an orchestrator at %s and runners for %v, with mutual TLS between them.", at.API, at.Types())
	for _, e := range endpoints {
		s.say("%s is a sandbox on this machine: %s", e.Name, e.URL)
	}
	if noImage != nil {
		s.say("Docker is skipped: %s", terminalLines(noImage.Error()))
	}
	return runDemo(ctx, s, out, at.API, workflow, documents, noImage)
}

func runDemo(ctx context.Context, s IO, out *output, address, workflow string, d local.Documents, noImage error) error {
	c, err := client.New(address)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	run, err := c.Execute(ctx, client.Action{Workflow: workflow, Input: map[string]any{"docker_available": noImage == nil}})
	if err != nil {
		return err
	}
	if run, err = follow(ctx, s, c, run, false); err != nil {
		return err
	}
	if out.json() {
		return s.printResult(out, run, false)
	}
	if !s.err().Live && run.GetStatus() == specqlv1.Status_STATUS_COMPLETED {
		s.conclude(run)
	}
	var skipped [][3]string
	if noImage != nil {
		reason := "no image"
		if errors.Is(noImage, local.ErrNoEngine) {
			reason = local.ErrNoEngine.Error()
		}
		for _, call := range dockerCalls(workflow, d) {
			skipped = append(skipped, [3]string{call, "docker", reason})
		}
	}
	screen := s.out()
	lines := append([]string{""}, tree.Usage(run.GetJobs(), skipped...).Lines(screen)...)
	lines = append(lines, "", fmt.Sprintf("%s means not measured: a figure is never guessed.", absent(screen)))
	if err := s.lines(lines, ""); err != nil {
		return err
	}
	if run.GetStatus() != specqlv1.Status_STATUS_COMPLETED {
		return s.printResult(out, run, false)
	}
	return nil
}

// dockerCalls are the workflow's calls of Docker services.
func dockerCalls(workflow string, d local.Documents) []string {
	action, _ := spec.ParseWorkflow(spec.File{Name: "demo.yaml", Content: []byte(workflow)}, spec.Options{})
	registry, _ := spec.ParseRegistry(d.Registry, spec.Options{Env: d.Env, LookupEnv: os.LookupEnv})
	if action == nil || registry == nil {
		return nil
	}
	var calls []string
	spec.Walk(action.Steps, func(step spec.Step) bool {
		call, ok := step.(*spec.CallService)
		if !ok {
			return true
		}
		if service := registry.Service(call.Service); service != nil && service.ExecutionType == "docker" {
			calls = append(calls, call.Service+"."+call.Operation)
		}
		return true
	})
	return calls
}

func absent(screen terminal.Screen) string {
	if !screen.Unicode {
		return "-"
	}
	return tree.Absent
}

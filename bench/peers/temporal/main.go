// Command temporal drives Temporal: a worker and a client of its Go SDK, against a server that runs already.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/log"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/bench/peers/drive"
)

const (
	namespace = "bench"
	queue     = "bench"
	// startWait is how long the server may take until it knows a new namespace.
	startWait = 2 * time.Minute
)

func main() {
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "temporal:", err)
		os.Exit(1)
	}
}

// Noop is an activity that does nothing.
func Noop(context.Context) (int, error) { return 0, nil }

// Fibonacci is an activity that computes fibonacci(10).
func Fibonacci(context.Context) (int, error) { return drive.Fibonacci(10), nil }

func activities(ctx workflow.Context) workflow.Context {
	return workflow.WithActivityOptions(ctx, workflow.ActivityOptions{StartToCloseTimeout: time.Minute})
}

func sequential(ctx workflow.Context, n int, activity any) (sum int, err error) {
	for range n {
		var v int
		if err := workflow.ExecuteActivity(activities(ctx), activity).Get(ctx, &v); err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}

// Noops runs n activities, one after the other.
func Noops(ctx workflow.Context, n int) (int, error) { return sequential(ctx, n, Noop) }

// Fibonaccis runs n activities, one after the other.
func Fibonaccis(ctx workflow.Context, n int) (int, error) { return sequential(ctx, n, Fibonacci) }

// Parallel runs n activities at the same time.
func Parallel(ctx workflow.Context, n int) (int, error) {
	futures := make([]workflow.Future, n)
	for i := range n {
		futures[i] = workflow.ExecuteActivity(activities(ctx), Noop)
	}
	for _, f := range futures {
		if err := f.Get(ctx, nil); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// quiet drops what the SDK logs.
type quiet struct{}

func (quiet) Debug(string, ...any) {}
func (quiet) Info(string, ...any)  {}
func (quiet) Warn(string, ...any)  {}
func (quiet) Error(string, ...any) {}

var _ log.Logger = quiet{}

func run(ctx context.Context, address string) error {
	ready, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	c, err := connect(ready, address)
	if err != nil {
		return err
	}
	defer c.Close()
	w := worker.New(c, queue, worker.Options{MaxConcurrentActivityExecutionSize: 1000, MaxConcurrentWorkflowTaskExecutionSize: 1000, MaxConcurrentActivityTaskPollers: 16, MaxConcurrentWorkflowTaskPollers: 16})
	w.RegisterWorkflow(Noops)
	w.RegisterWorkflow(Fibonaccis)
	w.RegisterWorkflow(Parallel)
	w.RegisterActivity(Noop)
	w.RegisterActivity(Fibonacci)
	if err := w.Start(); err != nil {
		return err
	}
	defer w.Stop()
	start := func(fn any, n int) func(context.Context) error {
		return func(ctx context.Context) error {
			r, err := c.ExecuteWorkflow(ctx, client.StartWorkflowOptions{TaskQueue: queue}, fn, n)
			if err != nil {
				return err
			}
			return r.Get(ctx, nil)
		}
	}
	for first := start(Noops, 1); ; { // a namespace is known a while after it was made
		if err := first(ready); err == nil {
			break
		} else if ready.Err() != nil {
			return err
		}
	}
	return drive.Serve(ctx, drive.Shapes{
		"1 step": start(Noops, 1), "10 sequential": start(Noops, 10), "40 sequential": start(Fibonaccis, 40), "100 parallel": start(Parallel, 100),
	})
}

// connect waits for the server and has it make the namespace.
func connect(ctx context.Context, address string) (client.Client, error) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := client.Dial(client.Options{HostPort: address, Namespace: namespace, Logger: quiet{}})
		if err == nil {
			_, err = c.WorkflowService().RegisterNamespace(ctx, &workflowservice.RegisterNamespaceRequest{
				Namespace: namespace, WorkflowExecutionRetentionPeriod: durationpb.New(24 * time.Hour),
			})
			if err == nil {
				return c, nil
			}
			c.Close()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("no server at %s: %w", address, err)
		}
	}
}

// Command dbos drives DBOS Transact for Go, a library that keeps the steps of workflows in PostgreSQL. The steps run in this
// process: no call leaves it.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"

	"github.com/specql/mesh/bench/peers/drive"
)

func main() {
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "dbos:", err)
		os.Exit(1)
	}
}

func noop(context.Context) (int, error)      { return 0, nil }
func fibonacci(context.Context) (int, error) { return drive.Fibonacci(10), nil }

func noops(ctx dbos.Context, n int) (int, error) { return sequential(ctx, n, noop) }

func fibonaccis(ctx dbos.Context, n int) (int, error) { return sequential(ctx, n, fibonacci) }

func sequential(ctx dbos.Context, n int, step dbos.Step[int]) (sum int, err error) {
	for range n {
		v, err := dbos.RunAsStep(ctx, step)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}

func parallel(ctx dbos.Context, n int) (int, error) {
	steps := make([]<-chan dbos.StepOutcome[int], n)
	for i := range n {
		var err error
		if steps[i], err = dbos.Go(ctx, noop); err != nil {
			return 0, err
		}
	}
	for _, s := range steps {
		if o := <-s; o.Err != nil {
			return 0, o.Err
		}
	}
	return n, nil
}

func run(ctx context.Context, database string) error {
	c, err := dbos.NewContext(ctx, dbos.Config{AppName: "bench", DatabaseURL: database, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return err
	}
	dbos.RegisterWorkflow(c, noops)
	dbos.RegisterWorkflow(c, fibonaccis)
	dbos.RegisterWorkflow(c, parallel)
	if err := dbos.Launch(c); err != nil {
		return err
	}
	start := func(w dbos.Workflow[int, int], n int) func(context.Context) error {
		return func(context.Context) error {
			h, err := dbos.RunWorkflow(c, w, n)
			if err != nil {
				return err
			}
			_, err = h.GetResult()
			return err
		}
	}
	if err := drive.Serve(ctx, drive.Shapes{
		"1 step": start(noops, 1), "10 sequential": start(noops, 10), "40 sequential": start(fibonaccis, 40), "100 parallel": start(parallel, 100),
	}); err != nil {
		return err
	}
	return dbos.Shutdown(c, 5*time.Second)
}

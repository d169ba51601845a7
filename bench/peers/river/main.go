// Command river drives River, a queue of jobs in PostgreSQL whose workers are in this process: a job of it is one step, and what is
// measured is the store alone.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/specql/mesh/bench/peers/drive"
)

func main() {
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "river:", err)
		os.Exit(1)
	}
}

type noop struct{}

// Kind implements river.JobArgs.
func (noop) Kind() string { return "noop" }

type worker struct{ river.WorkerDefaults[noop] }

// Work implements river.Worker.
func (worker) Work(context.Context, *river.Job[noop]) error { return nil }

func run(ctx context.Context, database string) error {
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		return err
	}
	config.MaxConns = 40
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return err
	}
	defer pool.Close()
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, worker{})
	// As fast as its settings allow: jobs are fetched every millisecond, where the default is 100.
	c, err := river.NewClient(driver, &river.Config{
		Queues: map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 1000}}, Workers: workers,
		FetchCooldown: time.Millisecond, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		return err
	}
	events, unsubscribe := c.Subscribe(river.EventKindJobCompleted)
	defer unsubscribe()
	ended := &ended{waits: map[int64]chan struct{}{}, early: map[int64]bool{}}
	go func() {
		for e := range events {
			ended.is(e.Job.ID)
		}
	}()
	if err := c.Start(ctx); err != nil {
		return err
	}
	if err := drive.Serve(ctx, drive.Shapes{"1 step": func(ctx context.Context) error {
		r, err := c.Insert(ctx, noop{}, nil)
		if err != nil {
			return err
		}
		return ended.wait(ctx, r.Job.ID)
	}}); err != nil {
		return err
	}
	return c.Stop(ctx)
}

// ended tells those who wait for a job that it has ended, whoever of both comes first.
type ended struct {
	mu    sync.Mutex
	waits map[int64]chan struct{}
	early map[int64]bool
}

func (e *ended) is(id int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if done := e.waits[id]; done != nil {
		close(done)
		delete(e.waits, id)
		return
	}
	e.early[id] = true
}

func (e *ended) wait(ctx context.Context, id int64) error {
	e.mu.Lock()
	if e.early[id] {
		delete(e.early, id)
		e.mu.Unlock()
		return nil
	}
	done := make(chan struct{})
	e.waits[id] = done
	e.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

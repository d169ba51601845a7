package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/specql/mesh/pkg/client"
)

// asleep is a workflow that waits longer than anybody measures.
const asleep = "actions:\n  - wait: {seconds: 86400}\n"

// scale measures what an orchestrator costs that has nothing to do, then what so many sleeping runs cost it: memory, and the
// throughput of others.
func (b *bench) scale(ctx context.Context, m *meter, s *system, sleepers, rounds int) error {
	idle := func(what string) error {
		before, err := m.read(ctx)
		if err != nil {
			return err
		}
		timer := time.NewTimer(10 * time.Second)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		after, err := m.read(ctx)
		if err != nil {
			return err
		}
		spent := before.until(after)
		b.sayf("%s: orchestrator %.1f CPU-ms a second, runner %.1f, PostgreSQL %.1f; %.1f write transactions a second", what,
			ms(spent.cpu["orchestrator"])/spent.took.Seconds(), ms(spent.cpu["runner"])/spent.took.Seconds(),
			ms(spent.cpu["postgresql"])/spent.took.Seconds(), float64(spent.writes)/spent.took.Seconds())
		return nil
	}
	memory := func() (float64, error) { return residentMB(s.orchestrator.cmd.Process.Pid) }
	if err := idle("idle"); err != nil {
		return err
	}
	if err := b.warmUp(ctx, s.client); err != nil {
		return err
	}
	throughput := func() (rate, cpu spread, err error) {
		from := len(b.results)
		for range rounds {
			if err := b.measure(ctx, m, s.client, shapes()[0], 32); err != nil {
				return rate, cpu, err
			}
		}
		return spreadOf(b.results[from:], (*result).rate), spreadOf(b.results[from:], (*result).stepCPU), nil
	}
	rate, cpu, err := throughput()
	if err != nil {
		return err
	}
	before, err := memory()
	if err != nil {
		return err
	}
	if err := fallAsleep(ctx, s.client, sleepers); err != nil {
		return err
	}
	// What autovacuum and the checkpointer have to do after so many rows, and would do in time.
	for _, statement := range []string{"VACUUM (ANALYZE) jobs.tb_workflow_run", "VACUUM (ANALYZE) jobs.tb_workflow_step", "CHECKPOINT"} {
		if _, err := b.db.Exec(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	after, err := memory()
	if err != nil {
		return err
	}
	b.sayf("%d runs asleep: resident memory of the orchestrator %.0f MB, %.0f MB before", sleepers, after, before)
	if err := idle("with sleepers"); err != nil {
		return err
	}
	laterRate, laterCPU, err := throughput()
	if err != nil {
		return err
	}
	b.sayf("1 step x 32: workflows a second / F32 %s before and %s with sleepers; CPU-ms %s and %s", rate.text(3), laterRate.text(3), cpu.text(3), laterCPU.text(3))
	return nil
}

// fallAsleep starts runs that sleep, and returns when all are durable.
func fallAsleep(ctx context.Context, c *client.Client, n int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for ctx.Err() == nil && next.Add(1) <= int64(n) {
				if _, err := c.Execute(ctx, client.Action{Workflow: asleep}); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// residentMB is the memory of a process in MiB.
func residentMB(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kb float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kb); n == 1 {
			return kb / 1024, nil
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}

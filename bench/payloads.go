package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/specql/mesh/pkg/client"
)

// echoing hands its input to a step, whose output is the same again: the payload is stored three times, as the input of the run and as
// what the job got and gave.
const echoing = "input: {data: string}\nactions:\n  - call_service: {service: bench, operation: noop, input: {data: \"$input.data\"}, as: echo}\n"

// payloads measures what the size of what a step gets and gives costs.
func (b *bench) payloads(ctx context.Context, m *meter, c *client.Client) error {
	for _, size := range []int{1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4<<20 - 64} {
		input, err := json.Marshal(map[string]string{"data": strings.Repeat("abcdefgh", size/8)})
		if err != nil {
			return err
		}
		for _, concurrency := range []int{1, 8} {
			floors, err := b.before(ctx)
			if err != nil {
				return err
			}
			r, err := load{concurrency: concurrency, duration: b.duration}.measure(ctx, m, func(ctx context.Context) error {
				_, err := c.ExecuteAndWait(ctx, client.Action{Workflow: echoing, Input: json.RawMessage(input)})
				return err
			})
			if err != nil {
				return fmt.Errorf("%d bytes: %w", size, err)
			}
			r.System, r.Shape, r.Steps = ours, fmt.Sprintf("%d KiB", (size+64)>>10), 1
			floors.put(r)
			b.add(r)
			b.sayf("  %.1f MiB a second of input; the database's log is %.1f times the input", r.PerSecond*float64(size)/(1<<20), r.WAL/float64(size))
		}
	}
	return nil
}

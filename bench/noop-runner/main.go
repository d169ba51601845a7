// Command noop-runner is a runner whose jobs cost next to nothing, so that a measurement shows
// what everything around a job costs. It serves the execution type noop with two operations: noop,
// which answers with its input, and fibonacci, which computes a number of the series the slow way.
package main

import (
	"context"
	"encoding/json"
	"os"
	"strconv"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/timerslack"
)

func main() {
	timerslack.Allow(timerslack.Services) // as the HTTP runner does
	os.Exit(runner.Main("noop-runner", build))
}

func build(context.Context, *runner.Env) (runner.JobRunner, error) { return noop{}, nil }

type noop struct{}

// Describe implements runner.JobRunner.
func (noop) Describe(context.Context) (*runner.Description, error) {
	nothing := runner.SchemaOf[struct{}]()
	return &runner.Description{
		Name: "noop-runner", Types: []runner.Type{{Name: "noop", ConfigSchema: nothing, PolicySchema: nothing, OperationSchema: nothing, DefaultMaxRetries: 3}},
	}, nil
}

// Validate implements runner.JobRunner.
func (noop) Validate(context.Context, *runner.Service) ([]runner.Problem, error) { return nil, nil }

// maxN bounds how long a job computes: about a second.
const maxN = 42

// Execute implements runner.JobRunner.
func (noop) Execute(_ context.Context, job *runner.Job, _ runner.Sink) (*runner.Result, error) {
	if job.Operation.Name != "fibonacci" {
		// What came goes back, so that payloads of any size can be measured.
		return &runner.Result{Output: job.Input}, nil
	}
	var input struct {
		N int `json:"n"`
	}
	if err := json.Unmarshal(job.Input, &input); err != nil {
		return &runner.Result{Err: fault.Wrap(err, fault.Validation, "%v", err)}, nil
	}
	if input.N < 0 || input.N > maxN {
		return &runner.Result{Err: fault.New(fault.Validation, "n is between 0 and %d", maxN)}, nil
	}
	return &runner.Result{Output: json.RawMessage(`{"value":` + strconv.Itoa(fibonacci(input.N)) + `}`)}, nil
}

func fibonacci(n int) int {
	if n < 2 {
		return n
	}
	return fibonacci(n-1) + fibonacci(n-2)
}

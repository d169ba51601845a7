package engine_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestOutcomes(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name, workflow, output string
		input                  map[string]any
		code                   fault.Code
		message                string
		calls                  string
	}{
		{
			name:     "a call gives its output to the next",
			workflow: `actions: [{call_service: {service: svc, operation: echo, input: {a: "$input.x"}}}, {call_service: {service: store, operation: save, input: {b: "$echo.a", all: "got $echo.a"}}}]`,
			input:    map[string]any{"x": 7.0}, output: `{"b":7,"all":"got 7"}`, calls: "echo save",
		},
		{
			name:     "on_success sees the response under any name",
			workflow: `actions: [{call_service: {service: svc, operation: echo, input: {data: 1}, on_success: [{call_service: {service: svc, operation: other, input: {d: "$api_response.data", r: "$response.data"}}}]}}]`,
			output:   `{"d":1,"r":1}`, calls: "echo other",
		},
		{
			name:     "a handled failure goes on",
			workflow: `actions: [{call_service: {service: svc, operation: fail, on_failure: [{call_service: {service: svc, operation: echo, input: {why: "$error.message", code: "$error.code"}}}]}}, {call_service: {service: svc, operation: other, input: {w: "$echo.code"}}}]`,
			output:   `{"w":"REMOTE_ERROR"}`, calls: "fail echo other",
		},
		{
			name:     "an empty on_failure handles too",
			workflow: `actions: [{call_service: {service: svc, operation: fail, on_failure: []}}, {call_service: {service: svc, operation: other}}]`,
			output:   `{}`, calls: "fail other",
		},
		{
			name:     "an unhandled failure fails the run and later steps do not run",
			workflow: `actions: [{call_service: {service: svc, operation: fail}}, {call_service: {service: svc, operation: other}}]`,
			code:     fault.RemoteError, message: "steps[0] (svc.fail): the target said no", calls: "fail",
		},
		{
			name:     "a failure inside on_failure fails the run",
			workflow: `actions: [{call_service: {service: svc, operation: fail, on_failure: [{fail: {message: "because $error.code"}}]}}]`,
			code:     fault.Validation, message: "steps[0].on_failure[0]: because REMOTE_ERROR", calls: "fail",
		},
		{
			name:     "a retried call",
			workflow: `actions: [{call_service: {service: svc, operation: flaky, input: {k: 1}}}]`,
			output:   `{"k":1}`, calls: "flaky flaky flaky",
		},
		{
			name:     "too few retries",
			workflow: `actions: [{call_service: {service: svc, operation: flaky, max_retries: 1}}]`,
			code:     fault.Unavailable, calls: "flaky flaky",
		},
		{
			name:     "if takes then",
			workflow: `actions: [{if: {condition: "$input.gpu", then: [{call_service: {service: svc, operation: echo}}], else: [{call_service: {service: svc, operation: other}}]}}]`,
			input:    map[string]any{"gpu": true}, output: `{}`, calls: "echo",
		},
		{
			name:     "if takes else",
			workflow: `actions: [{if: {condition: "input.n > 3 && input.s.startsWith('a')", then: [{call_service: {service: svc, operation: echo}}], else: [{call_service: {service: svc, operation: other}}]}}]`,
			input:    map[string]any{"n": 2.0, "s": "abc"}, output: `{}`, calls: "other",
		},
		{
			name:     "foreach keeps order, and its results are a list outside",
			workflow: `actions: [{foreach: {items: "$input.list", as: x, do: [{call_service: {service: svc, operation: echo, input: {v: "$x", i: "$index"}}}]}}, {call_service: {service: svc, operation: other, input: {all: "$echo"}}}]`,
			input:    map[string]any{"list": []any{"a", "b"}}, output: `{"all":[{"v":"a","i":0},{"v":"b","i":1}]}`, calls: "echo echo other",
		},
		{
			name:     "foreach over nothing",
			workflow: `actions: [{foreach: {items: "$input.list", do: [{call_service: {service: svc, operation: echo}}]}}]`,
			input:    map[string]any{"list": []any{}}, output: `[]`, calls: "",
		},
		{
			name:     "nested foreach",
			workflow: `actions: [{foreach: {items: "$input.rows", as: row, do: [{foreach: {items: "$row", as: cell, do: [{call_service: {service: svc, operation: echo, input: {c: "$cell"}}}]}}]}}]` + "\noutput: {all: \"$echo\"}",
			input:    map[string]any{"rows": []any{[]any{1.0, 2.0}, []any{3.0}}}, output: `{"all":[{"c":1},{"c":2},{"c":3}]}`, calls: "echo echo echo",
		},
		{
			name:     "foreach over no list",
			workflow: `actions: [{foreach: {items: "$input.list", do: [{call_service: {service: svc, operation: echo}}]}}]`,
			input:    map[string]any{"list": "x"}, code: fault.Validation, message: "items has to be a list and is a string",
		},
		{
			name:     "validate holds",
			workflow: `actions: [{validate: {conditions: ["input.n > 0"]}}, {call_service: {service: svc, operation: echo}}]`,
			input:    map[string]any{"n": 1.0}, output: `{}`, calls: "echo",
		},
		{
			name:     "validate does not hold",
			workflow: `actions: [{validate: {conditions: ["input.n > 0"]}}, {call_service: {service: svc, operation: echo}}]`,
			input:    map[string]any{"n": -1.0}, code: fault.Validation, message: "the condition does not hold: input.n > 0",
		},
		{
			name:     "an input that breaks the schema is not sent",
			workflow: `actions: [{call_service: {service: svc, operation: typed, input: {n: "x"}}}]`,
			code:     fault.Validation, message: "input",
		},
		{
			name:     "a missing field lists those there are",
			workflow: `actions: [{call_service: {service: svc, operation: echo, input: {n: "$input.a.b"}}}]`,
			input:    map[string]any{"a": map[string]any{"c": 1.0}}, code: fault.Validation, message: "c",
		},
		{
			name:     "wait",
			workflow: `actions: [{wait: {seconds: 1}}, {call_service: {service: svc, operation: echo}}]`, output: `{}`, calls: "echo",
		},
		{
			name:     "await_signal times out",
			workflow: `actions: [{await_signal: {name: go, timeout: 1}}]`, code: fault.Timeout, message: `no signal "go"`,
		},
		{
			name:     "nothing to do",
			workflow: `{actions: [{if: {condition: "false", then: [{call_service: {service: svc, operation: echo}}]}}], output: {n: "${ 1 + 2 }"}}`,
			output:   `{"n":3}`,
		},
		{
			name:     "parallel fails fast and cancels the others",
			workflow: `actions: [{parallel: [{call_service: {service: svc, operation: hang}}, {call_service: {service: svc, operation: fail}}]}]`,
			code:     fault.RemoteError, message: "svc.fail",
		},
		{
			name:     "parallel waits for all",
			workflow: `actions: [{parallel: {on_error: wait_all, branches: [{call_service: {service: svc, operation: echo}}, {call_service: {service: svc, operation: fail}}]}}]`,
			code:     fault.RemoteError, message: "svc.fail",
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			r := w.run(w.start(), c.workflow, c.input)
			if c.code != "" {
				require.Equal(t, store.Failed, r.Status)
				require.Equal(t, c.code, r.Err.Code)
				require.Contains(t, r.Err.Message, c.message)
			} else {
				require.Nil(t, r.Err)
				require.Equal(t, store.Completed, r.Status)
				require.JSONEq(t, c.output, string(r.Output))
			}
			if c.calls != "" {
				var names []string
				for _, x := range w.seen() {
					names = append(names, x.operation)
				}
				require.Equal(t, c.calls, strings.Join(names, " "))
			}
			jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
			require.NoError(t, err)
			for _, j := range jobs {
				require.True(t, j.Status.Final(), "%s is %s", j.StepPath, j.Status)
			}
		})
	}
}

func TestParallelBranchesRunAtTheSameTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	meet := make(chan struct{})
	first := make(chan struct{}, 1)
	w.behave["echo"] = func(ctx context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		select {
		case first <- struct{}{}:
			select {
			case <-meet:
			case <-ctx.Done():
			}
		default:
			close(meet)
		}
		return &engine.Outcome{Output: c.Job.Input}
	}
	r := w.run(w.start(), `actions: [{parallel: [{call_service: {service: svc, operation: echo, as: a}}, {call_service: {service: svc, operation: echo, as: b}}]}]`, nil)
	require.Equal(t, store.Completed, r.Status)
}

func TestSignalsAreKeptAndTakenOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	req := w.request(`{actions: [{await_signal: {name: go, as: first}}, {await_signal: {name: go, as: second}}], output: {a: "$first.n", b: "$second.n"}}`, nil)
	r, err := e.Start(t.Context(), req)
	require.NoError(t, err)
	require.NoError(t, e.Signal(t.Context(), r.ID, "go", json.RawMessage(`{"n":1}`)))
	require.NoError(t, e.Signal(t.Context(), r.ID, "go", json.RawMessage(`{"n":2}`)))
	require.NoError(t, e.Wait(t.Context(), r.ID))
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
	require.JSONEq(t, `{"a":1,"b":2}`, string(got.Output))
	require.ErrorIs(t, e.Signal(t.Context(), r.ID, "go", json.RawMessage(`null`)), store.ErrState)
}

func TestCancelEndsTheCallsFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	ended := make(chan struct{})
	w.behave["hang"] = func(ctx context.Context, _ *engine.Call, _ map[string]any) *engine.Outcome {
		<-ctx.Done()
		close(ended)
		return &engine.Outcome{Err: fault.New(fault.Cancelled, "ended")}
	}
	r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: hang, on_failure: [{call_service: {service: svc, operation: other}}]}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "hang", <-w.arrive)
	require.NoError(t, e.Cancel(t.Context(), r.ID, "enough"))
	select {
	case <-ended:
	default:
		t.Fatal("the run ended before its call did")
	}
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Cancelled, got.Status)
	require.Contains(t, got.Err.Message, "enough")
	require.ErrorIs(t, e.Cancel(t.Context(), r.ID, ""), store.ErrState)
	require.Len(t, w.seen(), 1, "on_failure is not for cancelled calls")
}

func TestRetryRunsTheFailedStepAgainAndNoOther(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	r := w.run(e, `actions: [{call_service: {service: svc, operation: echo, input: {v: 1}}}, {call_service: {service: svc, operation: fail, input: {v: "$echo.v"}}}]`, nil)
	require.Equal(t, store.Failed, r.Status)
	w.mu.Lock()
	w.behave["fail"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		return &engine.Outcome{Output: c.Job.Input}
	}
	w.mu.Unlock()
	require.NoError(t, e.Retry(t.Context(), r.ID))
	require.NoError(t, e.Wait(t.Context(), r.ID))
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
	require.Equal(t, 1, got.Retries)
	require.JSONEq(t, `{"v":1}`, string(got.Output))
	var ops []string
	for _, c := range w.seen() {
		ops = append(ops, c.operation)
	}
	require.Equal(t, []string{"echo", "fail", "fail"}, ops)
	require.NotEqual(t, w.seen()[1].key, w.seen()[2].key, "the target answered the first call: a new key asks anew")
	require.ErrorIs(t, e.Retry(t.Context(), r.ID), store.ErrState)
}

func TestIdempotencyKeyStartsOneRun(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	req := w.request(`actions: [{call_service: {service: svc, operation: echo}}]`, nil)
	req.IdempotencyKey = "k"
	errs := make(chan error, 20)
	for range 20 {
		go func() {
			_, err := e.Start(t.Context(), req)
			errs <- err
		}()
	}
	started := 0
	for range 20 {
		var dup *store.DuplicateError
		if err := <-errs; err == nil {
			started++
		} else {
			require.ErrorAs(t, err, &dup)
		}
	}
	require.Equal(t, 1, started)
	runs, err := w.store.Runs(t.Context(), store.RunFilter{Limit: 10})
	require.NoError(t, err)
	require.Len(t, runs, 1)
	require.NoError(t, e.Wait(t.Context(), runs[0].ID))
	require.Len(t, w.seen(), 1)
}

func TestEntityActionUpdatesItsRow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	p, problems := plan.Compile(w.entity.Action("pay"), w.entity, w.registry)
	require.NoError(t, problems.Err())
	require.True(t, p.UsesEntity)
	w.plans["pay"] = p
	row, err := w.entity.NewRow(nil, func() string { return "1c7e0000-0000-7000-8000-000000000001" })
	require.NoError(t, err)
	id := row["id"].(string)
	r, err := e.Start(t.Context(), &engine.StartRequest{Plan: p, Snapshot: "pay", Action: "pay", Row: row, Insert: true, EntityID: id, Input: map[string]any{}})
	require.NoError(t, err)
	require.NoError(t, e.Wait(t.Context(), r.ID))
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
	require.JSONEq(t, `{"status":"paid","amount":5}`, string(got.Output))
	stored, err := w.store.EntityRow(t.Context(), w.entity, id)
	require.NoError(t, err)
	require.Equal(t, "paid", stored["status"])

	again, err := e.Start(t.Context(), &engine.StartRequest{Plan: p, Snapshot: "pay", Action: "pay", Row: stored, EntityID: id, Input: map[string]any{}})
	require.NoError(t, err)
	require.NoError(t, e.Wait(t.Context(), again.ID))
	got, err = w.store.Run(t.Context(), again.ID)
	require.NoError(t, err)
	require.Equal(t, store.Failed, got.Status)
	require.Contains(t, got.Err.Message, "$entity.status == 'pending'")
}

func TestWatchResumesWithoutGaps(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	gate := make(chan struct{})
	w.behave["other"] = func(ctx context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		select {
		case <-gate:
		case <-ctx.Done():
		}
		return &engine.Outcome{Output: c.Job.Input}
	}
	r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: echo}}, {call_service: {service: svc, operation: other}}]`, nil))
	require.NoError(t, err)
	stop := context.Canceled
	var last int64
	var lines []string
	err = e.Watch(t.Context(), r.ID, 0, true, func(ev *engine.Event) error {
		last = max(last, ev.Sequence)
		if ev.Log != nil {
			lines = append(lines, ev.Log.Text)
			if ev.Log.Text == "working on other" {
				return stop
			}
		}
		return nil
	})
	require.ErrorIs(t, err, stop)
	close(gate)
	var jobs, logs int
	var final store.Status
	require.NoError(t, e.Watch(t.Context(), r.ID, last, true, func(ev *engine.Event) error {
		switch {
		case ev.Job != nil:
			jobs++
			require.Equal(t, "other", ev.Job.Operation)
		case ev.Log != nil:
			logs++
		case ev.Run != nil:
			final = ev.Run.Status
		}
		return nil
	}))
	require.Equal(t, store.Completed, final)
	require.Positive(t, jobs)
	require.Zero(t, logs, "lines were seen before")
	require.Equal(t, []string{"working on echo", "working on other"}, lines)
}

func TestDrainHandsBackAndAnotherGoesOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	j := store.NewJournal(w.store, store.JournalOptions{})
	e := w.engine(j)
	ids := map[string]bool{}
	for i := range 5 {
		r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: echo}}, {await_signal: {name: go}}, {call_service: {service: svc, operation: other, input: {n: "$go"}}}]`, map[string]any{"i": fmt.Sprint(i)}))
		require.NoError(t, err)
		ids[r.ID] = true
	}
	for id := range ids {
		require.Eventually(t, func() bool { return len(w.waiting(e, id)) == 1 }, wait, tick)
	}
	e.Close(t.Context())
	_, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: echo}}]`, nil))
	require.Error(t, err)
	require.NoError(t, j.Close())

	e = w.start()
	n, err := e.Recover(t.Context())
	require.NoError(t, err)
	require.Equal(t, 5, n)
	for id := range ids {
		require.NoError(t, e.Signal(t.Context(), id, "go", json.RawMessage(`3`)))
		require.NoError(t, e.Wait(t.Context(), id))
		r, err := w.store.Run(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, store.Completed, r.Status)
	}
	require.Len(t, w.seen(), 10)
}

func TestCallsCarryTheRunsTrace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	traces := make(chan string, 2)
	w.behave["echo"] = func(ctx context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		traces <- trace.SpanContextFromContext(ctx).TraceID().String()
		return &engine.Outcome{Output: c.Job.Input}
	}
	r := w.run(w.start(), `actions: [{call_service: {service: svc, operation: echo}}, {call_service: {service: svc, operation: echo, as: again}}]`, nil)
	want := strings.ReplaceAll(r.ID, "-", "")
	require.Equal(t, want, <-traces)
	require.Equal(t, want, <-traces)
}

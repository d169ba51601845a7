package engine_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestValues(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name, workflow, output string
		input                  map[string]any
		message                string // of a VALIDATION
	}{
		{
			name:     "a time that is past ends a wait at once",
			workflow: `{actions: [{wait: {until: "$input.t"}}], output: {ok: true}}`, input: map[string]any{"t": "1999-12-31T00:00:00Z"}, output: `{"ok":true}`,
		},
		{
			name:     "the zero time ends a wait at once",
			workflow: `{actions: [{wait: {until: "$input.t"}}], output: {ok: true}}`, input: map[string]any{"t": "0001-01-01T00:00:00Z"}, output: `{"ok":true}`,
		},
		{
			name:     "no time at all",
			workflow: `actions: [{wait: {until: "$input.t"}}]`, input: map[string]any{"t": "tomorrow"}, message: `steps[0]: until is "tomorrow"`,
		},
		{
			name:     "NaN seconds",
			workflow: `actions: [{wait: {seconds: "$input.n"}}]`, input: map[string]any{"n": "NaN"}, message: "NaN is no number of seconds",
		},
		{
			name:     "infinite seconds",
			workflow: `actions: [{wait: {seconds: "$input.n"}}]`, input: map[string]any{"n": "+Inf"}, message: "+Inf is no number of seconds",
		},
		{
			name:     "negative seconds",
			workflow: `actions: [{wait: {seconds: "$input.n"}}]`, input: map[string]any{"n": -1.0}, message: "-1 is no number of seconds",
		},
		{
			name:     "$error reaches into the on_success of a call in on_failure",
			workflow: `{actions: [{call_service: {service: svc, operation: fail, on_failure: [{call_service: {service: svc, operation: echo, input: {message: mine}, on_success: [{call_service: {service: store, operation: save, input: {why: "$error.message"}}}]}}]}}], output: {why: "$save.why"}}`,
			output:   `{"why":"the target said no"}`,
		},
		{
			name:     "nested foreach of which every inner list is empty",
			workflow: `{actions: [{foreach: {items: [[], []], as: row, do: [{foreach: {items: "$row", as: cell, do: [{call_service: {service: svc, operation: echo, input: {v: "$cell"}, as: got}}]}}]}}], output: {all: "$got"}}`,
			output:   `{"all":[]}`,
		},
		{
			name:     "the same name in then and else, then taken",
			workflow: `{actions: [{if: {condition: "$input.yes", then: [{call_service: {service: svc, operation: echo, input: {v: 1}, as: got}}], else: [{call_service: {service: svc, operation: other, input: {v: 2}, as: got}}]}}], output: {v: "$got.v"}}`,
			input:    map[string]any{"yes": true}, output: `{"v":1}`,
		},
		{
			name:     "the same name in then and else, else taken",
			workflow: `{actions: [{if: {condition: "$input.yes", then: [{call_service: {service: svc, operation: echo, input: {v: 1}, as: got}}], else: [{call_service: {service: svc, operation: other, input: {v: 2}, as: got}}]}}], output: {v: "$got.v"}}`,
			input:    map[string]any{"yes": false}, output: `{"v":2}`,
		},
		{
			name:     "a key of the input goes before $index",
			workflow: `{actions: [{foreach: {items: [7], do: [{call_service: {service: svc, operation: echo, input: {v: "$index"}, as: got}}]}}], output: {v: "$got"}}`,
			input:    map[string]any{"index": "mine"}, output: `{"v":[{"v":"mine"}]}`,
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			e := w.start()
			r, err := e.Start(t.Context(), w.request(c.workflow, c.input))
			require.NoError(t, err)
			got := w.finish(e, r.ID)
			if c.message != "" {
				require.Equal(t, store.Failed, got.Status)
				require.Equal(t, fault.Validation, got.Err.Code)
				require.Contains(t, got.Err.Message, c.message)
				return
			}
			require.Equal(t, store.Completed, got.Status, "%v", got.Err)
			require.JSONEq(t, c.output, string(got.Output))
		})
	}
}

func TestTimeoutOfASignalTakesADuration(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	r, err := e.Start(t.Context(), w.request(`actions: [{await_signal: {name: go, timeout: 2h}}]`, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return len(w.waiting(e, r.ID)) == 1 }, wait, tick)
	step := w.waiting(e, r.ID)[0]
	require.Equal(t, "2h0m0s", step.Until.Sub(step.StartedAt).String())
	require.NoError(t, e.Signal(t.Context(), r.ID, "go", []byte(`1`)))
	got := w.finish(e, r.ID)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
}

// What an expression gives on the first walk it gives on a replay, in a run that waited for
// its slot, and after a retry.
func TestValuesAreTheSameOnFirstWalkAndReplay(t *testing.T) {
	t.Parallel()
	const expressions = `{text: "x$input.small", half: "${ $input.big / 2 }", big: "$input.big", at: "$run.started_at"}`
	input := map[string]any{"small": 0.000001, "big": 9007199254740995.0 * 3}

	t.Run("after a restart", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		e := w.begin(&spyJournal{}, nil)
		r, err := e.Start(t.Context(), w.request(`{actions: [{call_service: {service: svc, operation: echo, input: `+expressions+`}}, {await_signal: {name: go}}], output: {before: "$echo", after: `+expressions+`}}`, input))
		require.NoError(t, err)
		require.Eventually(t, func() bool { return len(w.waiting(e, r.ID)) == 1 }, wait, tick)
		e.kill()
		again := w.start()
		_, err = again.Recover(t.Context())
		require.NoError(t, err)
		require.NoError(t, again.Signal(t.Context(), r.ID, "go", []byte(`1`)))
		got := w.finish(again, r.ID)
		require.Equal(t, store.Completed, got.Status, "%v", got.Err)
		var out struct{ Before, After json.RawMessage }
		require.NoError(t, json.Unmarshal(got.Output, &out))
		require.Equal(t, string(out.Before), string(out.After))
		require.Contains(t, string(out.Before), got.StartedAt.Format("2006-01-02T15:04:05"))
	})
	t.Run("in a queued run", func(t *testing.T) {
		t.Parallel()
		const workflow = `{actions: [{validate: ["true"]}], output: {text: "x$input.small", half: "${ $input.big / 2 }", big: "$input.big"}}`
		w := newWorld(t)
		e := w.begin(&spyJournal{}, maxRuns(1))
		first := w.run(e.Engine, workflow, input)
		busy, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: hang}}]`, nil))
		require.NoError(t, err)
		<-w.arrive
		queued, err := e.Start(t.Context(), w.request(workflow, input))
		require.NoError(t, err)
		require.Equal(t, store.Pending, queued.Status)
		require.NoError(t, e.Cancel(t.Context(), busy.ID, ""))
		got := w.finish(e.Engine, queued.ID)
		require.Equal(t, store.Completed, got.Status, "%v", got.Err)
		require.Equal(t, string(first.Output), string(got.Output))
	})
	t.Run("after a retry", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		e := w.start()
		r := w.run(e, `actions: [{call_service: {service: svc, operation: echo, input: `+expressions+`}}, {call_service: {service: svc, operation: fail, input: `+expressions+`}}]`, input)
		require.Equal(t, store.Failed, r.Status)
		require.NoError(t, e.Retry(t.Context(), r.ID))
		require.Equal(t, store.Failed, w.finish(e, r.ID).Status)
		jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
		require.NoError(t, err)
		require.Len(t, jobs, 3)
		for _, j := range jobs {
			require.Equal(t, string(jobs[0].Input), string(j.Input), "%s of try %d", j.StepPath, j.Generation)
		}
	})
}

func TestHostileOutputsEndTheirRunWithAClearError(t *testing.T) {
	t.Parallel()
	deep := strings.Repeat("[", 9000)
	cases := []struct{ name, output, message string }{
		{"nested deeply", deep + strings.Repeat("]", len(deep)), "nested deeper than 200"},
		{"a number beyond a double", `{"a":[1e308,{"b":-1e400}]}`, "output.a[1].b: -1e400 is beyond"},
		{"a number beyond PostgreSQL's", `1e200000`, "output: 1e200000 is beyond"},
		{"nested deeply and cut off", deep, "nested deeper than 200"},
		{"nested deeply after a quote", `{"\"": ` + deep, "nested deeper than 200"},
		{"two values", `{} {}`, "more than one value"},
		{"no UTF-8", "\xff", "not JSON"},
		{"a number without end", `{"n": 1e999999}`, "number"},
		{"too large", `"` + strings.Repeat("a", engine.MaxPayload) + `"`, "at most 4194304 are kept"},
		{"no object", `[1]`, "must be an object"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.behave["typed"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
				return &engine.Outcome{Output: json.RawMessage(c.output)}
			}
			e := w.start()
			r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: typed, input: {n: 1}}}]`, nil))
			require.NoError(t, err)
			got := w.finish(e, r.ID)
			require.Equal(t, store.Failed, got.Status)
			require.Equal(t, fault.Validation, got.Err.Code)
			require.Contains(t, got.Err.Message, c.message)
			require.Contains(t, got.Err.Message, "steps[0] (svc.typed)")
			require.Less(t, len(got.Err.Message), 1000)
			require.Len(t, w.seen(), 1)
		})
	}
}

func TestHugeErrorTextIsCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.behave["fail"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
		return &engine.Outcome{Err: fault.New(fault.RemoteError, "%s", strings.Repeat("ä", 2<<20))}
	}
	e := w.start()
	r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: fail}}]`, nil))
	require.NoError(t, err)
	got := w.finish(e, r.ID)
	require.Equal(t, fault.RemoteError, got.Err.Code)
	jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
	require.NoError(t, err)
	require.Less(t, len(got.Err.Message), 17<<10)
	require.Less(t, len(jobs[0].Err.Message), 17<<10)
	require.True(t, strings.HasSuffix(got.Err.Message, "ä…"), "cut between characters")
}

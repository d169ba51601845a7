package engine_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// author writes workflows that compile: a reference only names what stands before it.
type author struct {
	t     *rapid.T
	calls int
	loops int
}

// steps draws a list of steps and returns it with the names that it adds to those seen.
func (a *author) steps(depth, most int, seen []string) (string, []string) {
	n := rapid.IntRange(1, most).Draw(a.t, "steps")
	out := make([]string, 0, n)
	var names []string
	for range n {
		step, more := a.step(depth, slices.Concat(seen, names))
		out = append(out, step)
		names = append(names, more...)
	}
	return "[" + strings.Join(out, ", ") + "]", names
}

func (a *author) step(depth int, seen []string) (string, []string) {
	kinds := []string{"call", "call", "call", "wait"}
	if depth > 0 {
		kinds = append(kinds, "parallel", "foreach", "if")
	}
	switch rapid.SampledFrom(kinds).Draw(a.t, "kind") {
	case "wait":
		return "{wait: {seconds: 1}}", nil
	case "parallel":
		var branches, names []string
		for range rapid.IntRange(2, 3).Draw(a.t, "branches") {
			branch, more := a.steps(depth-1, 2, seen)
			branches, names = append(branches, branch), append(names, more...)
		}
		onError := rapid.SampledFrom([]string{"fail_fast", "wait_all"}).Draw(a.t, "on_error")
		return fmt.Sprintf("{parallel: {on_error: %s, branches: [%s]}}", onError, strings.Join(branches, ", ")), names
	case "foreach":
		a.loops++
		item := fmt.Sprintf("item%d", a.loops)
		items := rapid.SampledFrom([]string{"[]", "[1]", "[1, 2, 3]"}).Draw(a.t, "items")
		do, names := a.steps(depth-1, 2, append(slices.Clone(seen), item))
		return fmt.Sprintf("{foreach: {items: %s, as: %s, max_concurrency: %d, do: %s}}", items, item, rapid.IntRange(1, 3).Draw(a.t, "max_concurrency"), do), names
	case "if":
		then, names := a.steps(depth-1, 2, seen)
		other, more := a.steps(depth-1, 2, seen)
		return fmt.Sprintf("{if: {condition: %q, then: %s, else: %s}}", rapid.SampledFrom([]string{"true", "false", "input.yes"}).Draw(a.t, "condition"), then, other), append(names, more...)
	}
	return a.call(seen)
}

func (a *author) call(seen []string) (string, []string) {
	a.calls++
	name := fmt.Sprintf("call%d", a.calls)
	value := fmt.Sprint(a.calls)
	if len(seen) > 0 && rapid.Bool().Draw(a.t, "refers") {
		value = fmt.Sprintf("%q", "$"+rapid.SampledFrom(seen).Draw(a.t, "reference"))
	}
	call := func(operation, more string) string {
		return fmt.Sprintf("{call_service: {service: svc, operation: %s, as: %s, input: {v: %s}%s}}", operation, name, value, more)
	}
	switch rapid.SampledFrom([]string{"echo", "echo", "echo", "followed", "flaky", "handled", "fail"}).Draw(a.t, "call") {
	case "followed":
		return call("echo", fmt.Sprintf(", on_success: [{call_service: {service: svc, operation: other, as: %sb, input: {r: $response.v}}}]", name)), []string{name, name + "b"}
	case "flaky":
		return call("flaky", ""), []string{name}
	case "handled":
		return call("fail", fmt.Sprintf(", on_failure: [{call_service: {service: store, operation: save, as: %sb, input: {why: $error.code}}}]", name)), []string{name + "b"}
	case "fail":
		return call("fail", ""), []string{name}
	}
	return call("echo", ""), []string{name}
}

// Whatever a workflow does and wherever its orchestrator dies, it ends as it would have
// without that, and a target can tell a repeated call by its key.
func TestRandomWorkflowsEndTheSameWithACrash(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, randomWorkflowsEndTheSame)
}

func randomWorkflowsEndTheSame(t *testing.T, w *world) {
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		a := &author{t: rt}
		steps, _ := a.steps(2, 3, nil)
		text := "actions: " + steps
		write := rapid.Int64Range(1, 12).Draw(rt, "write")
		after := rapid.Bool().Draw(rt, "after")
		rt.Logf("%s", text)

		req := w.request(text, map[string]any{"yes": true})
		want, wantKeys := w.undisturbed(rt, *req)
		got, gotKeys, _ := w.disturbed(rt, *req, fmt.Sprint("run ", n), write, after)
		require.Equal(rt, want.Status, got.Status, "%v; without a crash: %v", got.Err, want.Err)
		require.Equal(rt, string(want.Output), string(got.Output))
		if want.Status == store.Completed {
			require.Equal(rt, slices.Sorted(maps.Keys(wantKeys)), slices.Sorted(maps.Keys(gotKeys)), "the steps that made a call")
		}
	})
}

// undisturbed runs a workflow to its end; the second result is the key of each step.
func (w *world) undisturbed(rt *rapid.T, req engine.StartRequest) (*store.Run, map[string]string) {
	before := len(w.seen())
	e := w.begin(&spyJournal{}, nil)
	defer e.kill()
	r, err := e.Start(w.t.Context(), &req)
	require.NoError(rt, err)
	return w.ended(rt, e.Engine, r.ID), w.keys(rt, before)
}

package e2e

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

const steps = 20

// twentySteps is a workflow whose steps each refer to the one before.
func twentySteps() string {
	var w strings.Builder
	w.WriteString("output: {sum: \"$step20.sum\"}\nactions:\n")
	for n := 1; n <= steps; n++ {
		sum := "0"
		if n > 1 {
			sum = fmt.Sprintf("$step%d.sum", n-1)
		}
		fmt.Fprintf(&w, "  - call_service: {service: worker, operation: work, as: step%d, input: {n: %d, sum: %q}}\n", n, n, sum)
	}
	return w.String()
}

// Killed in the middle of a run and started again on the same data, a mesh ends the run. What had completed is not called again; what
// was under way is called once more, under the same key.
func TestKilledMeshGoesOn(t *testing.T) {
	for i, at := range []int{1, 3, 5, 7, 9, 11, 13, 15, 17, 20} {
		// The process dies while a request is under way, or just as it has been answered.
		answered := i%2 == 1
		name := fmt.Sprintf("while request %d is under way", at)
		if answered {
			name = fmt.Sprintf("after request %d", at)
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			killAt(t, at, answered)
		})
	}
}

func killAt(t *testing.T, at int, answered bool) {
	t.Helper()
	r := newRecorder(t)
	var victim atomic.Pointer[dev]
	var killed atomic.Bool
	r.on("worker.work", func(w http.ResponseWriter, _ *http.Request, got request) {
		n := int(got.body["n"].(float64))
		die := n == at && killed.CompareAndSwap(false, true)
		if die && !answered {
			victim.Load().kill()
		}
		sum := 0.0
		_, _ = fmt.Sscan(fmt.Sprint(got.body["sum"]), &sum)
		respond(w, http.StatusOK, map[string]any{"sum": sum + float64(n)})
		if die && answered {
			_ = http.NewResponseController(w).Flush()
			victim.Load().kill()
		}
	})
	m := services(t, r)
	m.data = filepath.Join(t.TempDir(), "data")
	first := start(t, m)
	victim.Store(first)
	// The process may be gone before its answer comes; what was durable is found by the key.
	_, lost := first.Execute(t.Context(), client.Action{Workflow: twentySteps(), IdempotencyKey: "the-run"})
	select {
	case <-first.ended:
	case <-time.After(time.Minute):
		require.Fail(t, "the request that kills never came", "%v", lost)
	}

	second := start(t, m)
	run, err := second.Execute(t.Context(), client.Action{Workflow: twentySteps(), IdempotencyKey: "the-run"})
	require.NoError(t, err)
	done, err := second.Wait(t.Context(), run.GetId())
	require.NoError(t, err)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, done.GetStatus())
	require.InDelta(t, float64(steps*(steps+1)/2), done.GetOutput().GetStructValue().AsMap()["sum"], 0)
	require.Len(t, done.GetJobs(), steps)

	keys := map[int][]string{}
	for _, got := range r.of("worker.work") {
		n := int(got.body["n"].(float64))
		keys[n] = append(keys[n], got.header.Get("Idempotency-Key"))
	}
	require.Len(t, keys, steps)
	different := map[string]bool{}
	for n, calls := range keys {
		require.NotEmpty(t, calls[0])
		different[calls[0]] = true
		switch {
		case n < at || n > at && !answered:
			require.Len(t, calls, 1, "step %d had completed, or had not begun", n)
		case !answered:
			require.Len(t, calls, 2, "the step that was under way")
		}
		for _, key := range calls {
			require.Equal(t, calls[0], key, "the key of step %d", n)
		}
	}
	// What comes after an answer may have begun before the process was gone, but one call at a time is under way.
	require.LessOrEqual(t, len(r.of("worker.work")), steps+1)
	require.Len(t, different, steps, "each step has a key of its own")

	// The run that the key names is the one there is.
	all, _, err := second.List(t.Context(), &specqlv1.ListRunsRequest{})
	require.NoError(t, err)
	require.Len(t, all, 1)
}

// One run, many of its calls under way at the same time, in a mesh that is killed again and again.
func TestKilledAgainAndAgain(t *testing.T) {
	const items, concurrency, kills = 40, 4, 5
	r := newRecorder(t)
	reached := make(chan struct{}, kills)
	var arrived atomic.Int64
	r.on("worker.work", func(w http.ResponseWriter, req *http.Request, got request) {
		// Every seventh request is under way until the process dies.
		if n := arrived.Add(1); n%7 == 0 && n/7 <= kills {
			reached <- struct{}{}
			<-req.Context().Done()
			return
		}
		respond(w, http.StatusOK, map[string]any{"n": got.body["n"]})
	})
	m := services(t, r)
	m.data = filepath.Join(t.TempDir(), "data")
	numbers := make([]any, items)
	for i := range numbers {
		numbers[i] = i
	}
	d := start(t, m)
	run, err := d.Execute(t.Context(), client.Action{Input: map[string]any{"numbers": numbers}, Workflow: fmt.Sprintf(`
actions:
  - foreach:
      items: $input.numbers
      max_concurrency: %d
      do:
        - call_service: {service: worker, operation: work, input: {n: $item}}
`, concurrency)})
	require.NoError(t, err)
	for range kills {
		select {
		case <-reached:
		case <-time.After(time.Minute):
			require.Fail(t, "the request that kills never came")
		}
		d.kill()
		d = start(t, m)
	}
	done, err := d.Wait(t.Context(), run.GetId())
	require.NoError(t, err)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, done.GetStatus())
	require.Len(t, done.GetJobs(), items)

	keys := map[float64]string{}
	calls := r.of("worker.work")
	for _, got := range calls {
		n, key := got.body["n"].(float64), got.header.Get("Idempotency-Key")
		require.NotEmpty(t, key)
		if before, again := keys[n]; again {
			require.Equal(t, before, key, "item %v", n)
		}
		keys[n] = key
	}
	require.Len(t, keys, items)
	different := map[string]bool{}
	for _, key := range keys {
		different[key] = true
	}
	require.Len(t, different, items, "each item has a key of its own")
	require.LessOrEqual(t, len(calls), items+kills*concurrency, "no more is called again than was under way")
}

package engine_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const accountEntity = `
entity: account
fields:
  email: {type: string}
indexes: [{fields: [email], unique: true}]
actions:
  claim:
    steps:
      - call_service: {service: svc, operation: echo, input: {a: 1}}
      - update: {set: {email: taken@example.com}}
      - call_service: {service: svc, operation: other}
`

func rowID(n int) string { return fmt.Sprintf("1c7e0000-0000-7000-8000-%012d", n) }

func TestUpdateThatBreaksAUniqueIndexFailsItsRunAndRepeatsNoCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	first, err := e.Start(t.Context(), w.entityRequest(accountEntity, "claim", rowID(1), nil))
	require.NoError(t, err)
	require.Equal(t, store.Completed, w.finish(e, first.ID).Status)
	before := len(w.seen())

	req := w.entityRequest(accountEntity, "claim", rowID(2), nil)
	second, err := e.Start(t.Context(), req)
	require.NoError(t, err)
	got := w.finish(e, second.ID)
	require.Equal(t, store.Failed, got.Status)
	require.Equal(t, fault.Validation, got.Err.Code)
	require.Contains(t, got.Err.Message, "steps[1]")
	require.Contains(t, got.Err.Message, "email")
	require.Equal(t, []string{"echo"}, w.operations()[before:])
	jobs, err := w.store.Jobs(t.Context(), second.ID, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	require.Equal(t, store.Completed, jobs[0].Status, "what the call did is known, whatever became of the row")
	row, err := w.store.EntityRow(t.Context(), req.Plan.Entity, rowID(2))
	require.NoError(t, err)
	require.Nil(t, row["email"])
}

func TestUpdateOfARowDeletedMeanwhileFailsItsRun(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	req := w.entityRequest(accountEntity, "claim", rowID(1), nil)
	req.Insert = false
	r, err := e.Start(t.Context(), req)
	require.NoError(t, err)
	got := w.finish(e, r.ID)
	require.Equal(t, store.Failed, got.Status)
	require.Equal(t, fault.Validation, got.Err.Code)
	require.Contains(t, got.Err.Message, "steps[1]")
	require.Equal(t, []string{"echo"}, w.operations())
}

func TestParallelUpdatesKeepEveryField(t *testing.T) {
	t.Parallel()
	const fields, runs = 16, 25
	var entity strings.Builder
	entity.WriteString("entity: wide\nfields:\n")
	for i := range fields {
		fmt.Fprintf(&entity, "  f%d: {type: string}\n", i)
	}
	entity.WriteString("actions:\n  fill:\n    steps:\n      - parallel:\n")
	for i := range fields {
		fmt.Fprintf(&entity, "          - update: {set: {f%d: x}}\n", i)
	}
	w := newWorld(t)
	without := make(chan string, fields*runs)
	e := w.begin(&spyJournal{after: func(r *store.Record) {
		for _, s := range r.Steps {
			if s.Kind == "update" && r.UpdateRow == nil {
				without <- s.StepPath
			}
		}
	}}, nil)
	for i := range runs {
		req := w.entityRequest(entity.String(), "fill", rowID(i), nil)
		r, err := e.Start(t.Context(), req)
		require.NoError(t, err)
		got := w.finish(e.Engine, r.ID)
		require.Equal(t, store.Completed, got.Status, "%v", got.Err)
		row, err := w.store.EntityRow(t.Context(), req.Plan.Entity, rowID(i))
		require.NoError(t, err)
		for k := range fields {
			require.Equal(t, "x", row[fmt.Sprintf("f%d", k)], "run %d, field %d", i, k)
		}
	}
	require.Empty(t, without, "an update is durable together with its row")
}

package sqlite

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func newRecord(id string, inputBytes int) *store.Record {
	return &store.Record{RunID: id, Create: &store.Run{ID: id, Status: store.Running, Input: json.RawMessage(`"` + strings.Repeat("x", inputBytes) + `"`)}}
}

// TestDiskFull: a full disk fails the whole transaction, not one record, and is over when
// there is room again.
func TestDiskFull(t *testing.T) {
	st := openTest(t)
	require.NoError(t, exec(t, st, "PRAGMA jobs.max_page_count = 100"))
	_, err := st.Commit(t.Context(), []*store.Record{newRecord("small", 10), newRecord("large", 1<<20)})
	require.ErrorContains(t, err, "full")
	_, err = st.Run(t.Context(), "small")
	require.ErrorIs(t, err, store.ErrNotFound)

	require.NoError(t, exec(t, st, "PRAGMA jobs.max_page_count = 100000"))
	results, err := st.Commit(t.Context(), []*store.Record{newRecord("small", 10), newRecord("large", 1<<20)})
	require.NoError(t, err)
	require.Equal(t, []error{nil, nil}, results)
}

// TestWriteAheadLogIsBounded: reads that always overlap do not let the log grow for ever.
func TestWriteAheadLogIsBounded(t *testing.T) {
	st := openTest(t)
	st.maxLogBytes = 1 << 20
	_, err := st.Commit(t.Context(), []*store.Record{newRecord("first", 1000)})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for ctx.Err() == nil {
				_, _, _ = st.Query(ctx, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
					SELECT max(i), (SELECT count(*) FROM jobs.tb_workflow_run) FROM n`)
			}
		})
	}
	largest := int64(0)
	for n := range 100 {
		results, err := st.Commit(ctx, []*store.Record{newRecord(fmt.Sprintf("r%d", n), 100_000)})
		require.NoError(t, err)
		require.NoError(t, results[0])
		info, err := os.Stat(st.path + "-wal")
		require.NoError(t, err)
		largest = max(largest, info.Size())
	}
	cancel()
	readers.Wait()
	require.Less(t, largest, int64(7<<20))
}

// TestManyStatements: updates of every set of columns do not pile prepared statements up.
func TestManyStatements(t *testing.T) {
	st := openTest(t)
	e := &spec.Entity{Schema: "app", Name: "wide", Fields: []*spec.Field{{Name: "id", Type: "string"}}}
	for i := range 9 {
		e.Fields = append(e.Fields, &spec.Field{Name: fmt.Sprintf("f%d", i), Type: "integer"})
	}
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{e}))
	r := newRecord("r", 1)
	r.InsertRow = &store.EntityRow{Schema: "app", Entity: "wide", ID: "w"}
	records := []*store.Record{r}
	for set := 1; set < 1<<9; set++ {
		values := map[string]any{}
		for i := range 9 {
			if set&(1<<i) != 0 {
				values[fmt.Sprintf("f%d", i)] = set
			}
		}
		records = append(records, &store.Record{RunID: "r", UpdateRow: &store.EntityRow{Schema: "app", Entity: "wide", ID: "w", Values: values}})
	}
	results, err := st.Commit(t.Context(), records)
	require.NoError(t, err)
	for _, err := range results {
		require.NoError(t, err)
	}
	row, err := st.EntityRow(t.Context(), e, "w")
	require.NoError(t, err)
	require.Equal(t, int64(511), row["f0"])
	require.NoError(t, st.write(t.Context(), func(w *writer) error {
		require.LessOrEqual(t, len(w.statements), maxStatements)
		return nil
	}))
}

func TestIndexCondition(t *testing.T) {
	st := openTest(t)
	entity := func(where string, unique bool) *spec.Entity {
		return &spec.Entity{
			Schema: "app", Name: "thing", Fields: []*spec.Field{{Name: "a", Type: "string"}, {Name: "gone", Type: "boolean"}},
			Indexes: []*spec.Index{{Fields: []string{"a"}, Where: where, Unique: unique}},
		}
	}
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{entity("gone = false", true)}))
	// PostgreSQL's own words: an index that only makes things quicker may be missing, a
	// promise may not.
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{entity("a::date > now()", false)}))
	require.Error(t, st.EnsureEntities(t.Context(), []*spec.Entity{entity("a::date > now()", true)}))
	// A field's type stays.
	e := entity("", false)
	e.Fields[0].Type = "integer"
	require.ErrorContains(t, st.EnsureEntities(t.Context(), []*spec.Entity{e}), "a column's type is not changed")
}

package faults

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// insertJobs is what any SQL client does to have calls made: one statement, a row a call.
const insertJobs = `
INSERT INTO jobs.tb_job_run (identifier, service_name, operation, input_data, status)
SELECT $1 || '-' || n, 'worker', 'work', jsonb_build_object('run', $1::text, 'step', n::text, 'before', ''), 'pending'
FROM generate_series(1, $2::int) n`

// pollOf is how often n jobs are looked at: not so often that looking is most of the work.
func pollOf(n int) time.Duration {
	return max(5*time.Millisecond, min(time.Duration(n)*100*time.Microsecond, time.Second))
}

// untilCompleted waits until n jobs of a name have completed.
func (m *mesh) untilCompleted(ctx context.Context, name string, n int) {
	m.t.Helper()
	var completed, failed int
	require.Eventually(m.t, func() bool {
		err := m.db.QueryRow(ctx, `SELECT count(*) FILTER (WHERE status = 'completed'), count(*) FILTER (WHERE status IN ('failed', 'cancelled'))
			FROM jobs.tb_job_run WHERE input_data ->> 'run' = $1`, name).Scan(&completed, &failed)
		return err == nil && (completed == n || failed > 0)
	}, 3*patience, pollOf(n), "%d jobs of %s have completed", n, name)
	require.Zero(m.t, failed, "jobs of %s that failed", name)
}

// requireEachOnce fails unless each of n jobs had its effect, once, with a key of its own.
func (m *mesh) requireEachOnce(name string, n int) {
	m.t.Helper()
	steps, keys := map[string]int{}, map[string]bool{}
	for _, e := range m.recorder.all() {
		if e.Run == name {
			steps[e.Step]++
			keys[e.Key] = true
		}
	}
	for i := range n {
		require.Equal(m.t, 1, steps[fmt.Sprint(i+1)], "requests of row %d", i+1)
	}
	require.Len(m.t, steps, n)
	require.Len(m.t, keys, n)
}

// SQL is a front door: a row is a call, once its transaction has committed, and not otherwise.
func TestFrontDoor(t *testing.T) {
	const rows = 10_000
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	tx, err := m.db.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), insertJobs, "rolled back", 10)
	require.NoError(t, err)
	open, err := m.db.Begin(t.Context())
	require.NoError(t, err)
	_, err = open.Exec(t.Context(), insertJobs, "later", 10)
	require.NoError(t, err)

	_, err = m.db.Exec(t.Context(), insertJobs, "bulk", rows)
	require.NoError(t, err)
	m.untilCompleted(t.Context(), "bulk", rows)
	m.requireEachOnce("bulk", rows)
	for _, name := range []string{"rolled back", "later"} {
		require.False(t, slices.ContainsFunc(m.recorder.all(), func(e effect) bool { return e.Run == name }), "%s: a call of a transaction that has not committed", name)
	}
	require.NoError(t, tx.Rollback(t.Context()))
	require.NoError(t, open.Commit(t.Context()))
	m.untilCompleted(t.Context(), "later", 10)
	m.requireEachOnce("later", 10)
	// Whatever is looked for from time to time has been looked for again by now.
	_, err = m.db.Exec(t.Context(), insertJobs, "last", 1)
	require.NoError(t, err)
	m.untilCompleted(t.Context(), "last", 1)
	require.False(t, slices.ContainsFunc(m.recorder.all(), func(e effect) bool { return e.Run == "rolled back" }), "a call of a transaction that was rolled back")
	m.requireEachOnce("bulk", rows)

	// Both took their share, and each row has its answer.
	var answered int
	require.NoError(t, m.db.QueryRow(t.Context(), `SELECT count(*) FROM jobs.tb_job_run
		WHERE input_data ->> 'run' = 'bulk' AND output_data ->> 'token' <> '' AND completed_at IS NOT NULL AND attempts = 1`).Scan(&answered))
	require.Equal(t, rows, answered)
}

// A row with what no service takes fails like a call from the API, and holds up nothing.
func TestFrontDoorTellsWhatIsWrong(t *testing.T) {
	m := startMesh(t, size{orchestrators: 1, runners: 1})
	_, err := m.db.Exec(t.Context(), `
INSERT INTO jobs.tb_job_run (identifier, service_name, operation, input_data, status) VALUES
    ('bad-1', 'nobody', 'work', '{}', 'pending'),
    ('bad-2', 'worker', 'nothing', '{}', 'pending'),
    ('bad-3', 'worker', 'work', '{"run": 7, "step": "x", "before": ""}', 'pending'),
    ('bad-4', 'worker', 'work', '[]', 'pending'),
    ('good', 'worker', 'work', '{"run": "good", "step": "1", "before": ""}', 'pending')`)
	require.NoError(t, err)
	m.untilCompleted(t.Context(), "good", 1)
	type outcome struct{ Identifier, Status, Code string }
	var got []outcome
	require.Eventually(t, func() bool {
		got = query[outcome](t.Context(), t, m.db, `SELECT identifier, status, coalesce(error_code, '') FROM jobs.tb_job_run WHERE identifier LIKE 'bad-%' ORDER BY 1`)
		return !slices.ContainsFunc(got, func(o outcome) bool { return !final(o.Status) })
	}, patience, 20*time.Millisecond)
	require.Equal(t, []outcome{
		{"bad-1", "failed", "VALIDATION"},
		{"bad-2", "failed", "VALIDATION"},
		{"bad-3", "failed", "VALIDATION"},
		{"bad-4", "failed", "VALIDATION"},
	}, got)
	require.Len(t, m.recorder.all(), 1)
}

// BenchmarkFrontDoor measures 10,000 rows from the insert to the last row's completion.
func BenchmarkFrontDoor(b *testing.B) {
	const rows = 10_000
	m := startMesh(b, size{orchestrators: 2, runners: 2})
	n := 0
	for b.Loop() {
		n++
		name := fmt.Sprintf("bulk-%d", n)
		_, err := m.db.Exec(b.Context(), insertJobs, name, rows)
		require.NoError(b, err)
		m.untilCompleted(b.Context(), name, rows)
		m.requireEachOnce(name, rows)
	}
	b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "rows/s")
}

// BenchmarkPickup measures the time from the commit of a single row until its request arrives, with nothing else going on.
func BenchmarkPickup(b *testing.B) {
	m := startMesh(b, size{orchestrators: 2, runners: 2})
	conn, err := pgx.Connect(b.Context(), m.database)
	require.NoError(b, err)
	defer func() { _ = conn.Close(context.Background()) }()
	var took []time.Duration
	for b.Loop() {
		n := len(took) + 1
		_, err := conn.Exec(b.Context(), insertJobs, fmt.Sprintf("pickup-%d", n), 1)
		committed := time.Now()
		require.NoError(b, err)
		require.NoError(b, m.recorder.arrived(b.Context(), n))
		took = append(took, m.recorder.all()[n-1].Began.Sub(committed))
		m.untilCompleted(b.Context(), fmt.Sprintf("pickup-%d", n), 1)
	}
	slices.Sort(took)
	milliseconds := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(milliseconds(took[len(took)/2]), "median-ms")
	b.ReportMetric(milliseconds(took[len(took)*95/100]), "p95-ms")
}

// orderYAML is an entity with an action of two calls.
const orderYAML = `
entity: order
fields:
  status: {type: string, default: open}
actions:
  place:
    input: {note: string?}
    output: {token: "$s2.token"}
    actions:
      - %s
      - %s
`

// The function that is generated for an action starts it in the caller's transaction, once for each key.
func TestFunctionOfAnAction(t *testing.T) {
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	entities := filepath.Join(m.logs, "entities")
	require.NoError(t, os.Mkdir(entities, 0o700))
	order := []byte(fmt.Sprintf(orderYAML, call("s1", ""), call("s2", "s1")))
	require.NoError(t, os.WriteFile(filepath.Join(entities, "order.yaml"), order, 0o600))
	m.cluster.Psql(t, m.database, m.specql("generate-schema", entities))
	m.apply(t.Context(), m.orchestrators[0], m.registry, &specqlv1.Document{Name: "order.yaml", Content: order})

	const place = "SELECT app.place(input => '{\"note\": \"by SQL\"}', idempotency_key => $1)::text"
	var undone, id, again string
	tx, err := m.db.Begin(t.Context())
	require.NoError(t, err)
	require.NoError(t, tx.QueryRow(t.Context(), place, "undone").Scan(&undone))
	require.NoError(t, tx.Rollback(t.Context()))
	require.NoError(t, m.db.QueryRow(t.Context(), place, "done").Scan(&id))
	require.NoError(t, m.db.QueryRow(t.Context(), place, "done").Scan(&again))
	require.Equal(t, id, again, "one key is one run")
	require.NoError(t, m.untilEnded(t.Context(), patience))

	sum, bad := check(evidence{
		asked:        map[string]*shape{"done": {before: map[string]string{"s1": "", "s2": "s1"}, last: "s2"}},
		acknowledged: map[string]string{"done": id},
		rows:         runRows(t.Context(), t, m.db), effects: m.recorder.all(), changes: changes(t.Context(), t, m.db),
	})
	m.requireGood(bad)
	m.requireOnce(sum)
	require.Equal(t, 1, sum.runs)
	run, err := m.orchestrators[1].client.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, "by SQL", run.GetInput().AsMap()["note"])
}

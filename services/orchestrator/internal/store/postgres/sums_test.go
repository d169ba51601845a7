package postgres

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/test/pgtest"
)

// endings makes jobs that end in every way.
type endings struct {
	t      *testing.T
	st     *Store
	random *rand.Rand
	run    *store.Run
}

func newEndings(t *testing.T, st *Store) *endings {
	t.Helper()
	now := time.Now()
	e := &endings{t: t, st: st, random: rand.New(rand.NewPCG(3, 5)), run: &store.Run{ //nolint:gosec // the same each time
		ID: uuid.Must(uuid.NewV7()).String(), Action: "act", Status: store.Running, Owner: "o", Epoch: 1, Sequence: 1, CreatedAt: now, StartedAt: now,
	}}
	e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, Create: e.run})
	return e
}

func (e *endings) commit(records ...*store.Record) {
	e.t.Helper()
	results, err := e.st.Commit(e.t.Context(), records)
	require.NoError(e.t, err)
	for _, err := range results {
		require.NoError(e.t, err)
	}
}

func (e *endings) pick(values ...string) string { return values[e.random.IntN(len(values))] }

// started are running jobs, of which some began long ago.
func (e *endings) started(n int) []*store.Job {
	e.t.Helper()
	jobs := make([]*store.Job, n)
	for i := range jobs {
		created := time.Now().Add(-[]time.Duration{0, time.Hour, 5 * time.Hour, 100 * time.Hour}[e.random.IntN(4)])
		jobs[i] = &store.Job{
			ID: uuid.Must(uuid.NewV7()).String(), RunID: e.run.ID, StepPath: fmt.Sprintf("steps[%d]", e.random.Uint64()),
			Service: e.pick("api", `a "b" \c,(d){e}`, ""), Operation: e.pick("op", "ö\np"), ExecutionType: e.pick("http", "shell"),
			Status: store.Running, Attempts: e.random.IntN(3), MaxAttempts: 3, CreatedAt: created,
		}
		if e.random.IntN(20) == 0 {
			jobs[i].CreatedAt = time.Date(1, 1, 1, 5, 0, 0, 1, time.UTC)
		}
		if e.random.IntN(4) > 0 {
			jobs[i].StartedAt = jobs[i].CreatedAt.Add(time.Duration(e.random.Int64N(int64(time.Minute))))
			if e.random.IntN(20) == 0 { // by a clock that is ahead of the one that tells its end
				jobs[i].StartedAt = jobs[i].CreatedAt.Add(3 * time.Hour)
			}
		}
	}
	e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, NewJobs: jobs})
	return jobs
}

// end changes jobs, most of them for the last time.
func (e *endings) end(jobs []*store.Job) {
	for _, j := range jobs {
		j.Status = store.Status(e.pick("completed", "completed", "failed", "cancelled", "running"))
		j.Attempts = e.random.IntN(4)
		if j.Status == store.Running {
			continue
		}
		j.CompletedAt = j.CreatedAt.Add(time.Duration(e.random.Int64N(int64(2 * time.Hour))))
		if j.Status == store.Failed {
			j.Err = fault.New(fault.Timeout, "late")
		}
		if e.random.IntN(4) > 0 {
			j.Usage = e.usage()
			j.ResourceUsage = inJSON(e.t, j.Usage)
		}
		if e.random.IntN(4) > 0 {
			j.Security = &runnerv1.SecurityContext{PolicyDigest: "d", Runner: e.pick("", "r@a", `r"\,(){}`)}
			j.SecurityContext = inJSON(e.t, j.Security)
		}
	}
}

func inJSON(t *testing.T, m proto.Message) json.RawMessage {
	t.Helper()
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	require.NoError(t, err)
	return b
}

// usage has some of the figures, whose sums are the same in whatever order they are added up.
func (e *endings) usage() *runnerv1.ResourceUsage {
	u := &runnerv1.ResourceUsage{Source: "cgroup"}
	m := u.ProtoReflect()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch fd := fields.Get(i); {
		case e.random.IntN(2) == 0:
		case fd.Kind() == protoreflect.DoubleKind:
			m.Set(fd, protoreflect.ValueOfFloat64([]float64{0, 0.25, 0x1p-10, 12345.625, 0x1p30}[e.random.IntN(5)]))
		case fd.Kind() == protoreflect.BoolKind:
			m.Set(fd, protoreflect.ValueOfBool(e.random.IntN(2) == 0))
		}
	}
	return u
}

// sums are all figures, put together, and the histogram.
func (e *endings) sums() [][]map[string]any {
	e.t.Helper()
	list := ""
	for _, c := range e.st.sql.sumColumns {
		switch c {
		case "slots", "slot_jobs", "created_at", "ended_at", "execution_type", "service_name", "operation", "runner", "status":
		case "max_duration", "max_peak", "max_cost", "priced_last_at", "last_created_at", "last_ended_at":
			list += fmt.Sprintf(", max(%s)::text AS %[1]s", c)
		case "priced_first_at":
			list += fmt.Sprintf(", min(%s)::text AS %[1]s", c)
		default:
			list += fmt.Sprintf(", coalesce(sum(%s), 0)::double precision AS %[1]s", c)
		}
	}
	const keys = "created_at::text, ended_at::text, execution_type, service_name, operation, runner, status"
	return [][]map[string]any{
		view(e.t, e.st, "SELECT "+keys+list+" FROM jobs.tb_job_stat WHERE status IS NOT NULL GROUP BY "+keys+" HAVING sum(jobs) <> 0 ORDER BY "+keys),
		view(e.t, e.st, "SELECT execution_type, slot, sum(n)::bigint AS n FROM jobs.tb_job_stat, unnest(slots, slot_jobs) AS u (slot, n) GROUP BY 1, 2 HAVING sum(n) <> 0 ORDER BY 1, 2"),
	}
}

// equalCount compares the sums with what counting every job anew gives.
func (e *endings) equalCount() {
	e.t.Helper()
	followed := e.sums()
	require.NotEmpty(e.t, followed[0])
	require.NoError(e.t, run(e.t, e.st, "SELECT jobs.fn_stat_recount()"))
	// The last digits of a sum of seconds depend on the order in which they were added up.
	require.Empty(e.t, cmp.Diff(e.sums(), followed, cmpopts.EquateApprox(1e-12, 1e-6)))
}

// TestSums: what commits add to the sums is what the triggers would, and what counting anew gives.
func TestSums(t *testing.T) {
	st := openTest(t)
	require.Len(t, sumColumns, len(st.sql.sumColumns))
	e := newEndings(t, st)
	require.NoError(t, run(t, st, "ALTER TABLE jobs.tb_job_run DISABLE TRIGGER tr_job_run_stat_insert; ALTER TABLE jobs.tb_job_run DISABLE TRIGGER tr_job_run_stat_update"))
	for range 30 {
		jobs := e.started(1 + e.random.IntN(12))
		e.end(jobs)
		e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, ChangedJobs: jobs})
	}
	e.equalCount()
}

// TestSumsOfTriggers: where the triggers count, commits do not: for what they cannot know, and without an orchestrator's standing.
func TestSumsOfTriggers(t *testing.T) {
	address := ready(t)
	as := func(role string) string {
		u, err := url.Parse(address)
		require.NoError(t, err)
		q := u.Query()
		q.Set("options", "-c role="+role)
		u.RawQuery = strings.ReplaceAll(q.Encode(), "+", "%20")
		return u.String()
	}
	c := pgtest.Shared(t)
	c.Psql(t, address, "CREATE ROLE sums_owner; GRANT ALL ON SCHEMA jobs TO sums_owner; GRANT ALL ON ALL TABLES IN SCHEMA jobs TO sums_owner; GRANT pg_read_all_stats TO sums_owner")
	defer c.Psql(t, address, "DROP OWNED BY sums_owner; DROP ROLE sums_owner")
	for name, at := range map[string]string{"alone": address, "in a role": as("sums_owner")} {
		t.Run(name, func(t *testing.T) {
			e := newEndings(t, openAt(t, at))
			for n := range 30 {
				jobs := e.started(1 + e.random.IntN(4))
				e.end(jobs)
				odd := jobs[0]
				switch n % 5 {
				case 0: // what another process wrote down
					odd.Status, odd.CompletedAt, odd.Usage, odd.ResourceUsage = store.Completed, time.Now(), nil, json.RawMessage(`{"cpu_seconds": 3}`)
				case 1:
					odd.Status, odd.Err, odd.CompletedAt = store.Failed, nil, time.Now()
				case 2:
					odd.Status, odd.CompletedAt = store.Cancelled, time.Time{}
				case 3: // ended when it is new
					fresh := *odd
					fresh.ID, fresh.StepPath, fresh.Status, fresh.CompletedAt = uuid.Must(uuid.NewV7()).String(), odd.StepPath+"/n", store.Cancelled, time.Now()
					e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, NewJobs: []*store.Job{&fresh}})
				}
				e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, ChangedJobs: jobs})
				if odd.Status.Final() { // once more, with other figures
					again := *odd
					again.Attempts += 2
					e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, ChangedJobs: []*store.Job{&again}})
				}
			}
			e.equalCount()
		})
	}
}

// TestTriggersOfOthersAreCounted: a trigger of somebody else that writes jobs in an orchestrator's statement is nothing that the statement
// has seen to.
func TestTriggersOfOthersAreCounted(t *testing.T) {
	st := openTest(t)
	e := newEndings(t, st)
	require.NoError(t, run(t, st, `CREATE FUNCTION public.follow() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO jobs.tb_job_run (service_name, operation, status, completed_at) VALUES ('after', 'op', 'failed', now());
			RETURN NULL;
		END $$;
		CREATE TRIGGER follow AFTER UPDATE OF status ON jobs.tb_workflow_run FOR EACH ROW EXECUTE FUNCTION public.follow()`))
	e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 2, Run: &store.RunChange{Status: store.Completed, CompletedAt: time.Now()}})
	require.Equal(t, "INTERNAL", view(t, st, "SELECT error_code FROM jobs.tb_job_run WHERE service_name = 'after'")[0]["error_code"])
	e.equalCount()
}

// TestSumsOfWhatIsKept: where a table keeps something else than what is written to it, the triggers count.
func TestSumsOfWhatIsKept(t *testing.T) {
	old := func(change ...string) *Store {
		address := pgtest.Database(t)
		pgtest.Shared(t).Psql(t, address, "CREATE SCHEMA jobs; "+strings.NewReplacer(change...).Replace(legacyTables["plain"]))
		_, err := Migrate(t.Context(), Options{URL: address})
		require.NoError(t, err)
		return openAt(t, address)
	}
	const ids = "tenant_id uuid NOT NULL, triggered_by uuid NOT NULL"
	commit := func(st *Store) {
		t.Helper()
		e := newEndings(t, st)
		for range 10 {
			jobs := e.started(3)
			e.end(jobs)
			e.commit(&store.Record{RunID: e.run.ID, Epoch: 1, Sequence: 1, ChangedJobs: jobs})
		}
		e.equalCount()
	}
	commit(old(ids, "tenant_id uuid, triggered_by uuid, duration_seconds integer"))
	commit(old(ids, "tenant_id uuid, triggered_by uuid", "timestamptz", "timestamptz(0)"))

	// What is changed later is noticed with the next upkeep.
	for _, change := range []string{
		`CREATE FUNCTION public.loud() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.service_name := upper(NEW.service_name); RETURN NEW; END $$;
			CREATE TRIGGER loud BEFORE INSERT OR UPDATE ON jobs.tb_job_run FOR EACH ROW EXECUTE FUNCTION public.loud()`,
		"ALTER TABLE jobs.tb_job_stat ADD COLUMN later bigint",
	} {
		st := openTest(t)
		require.True(t, st.sums.Load())
		require.NoError(t, run(t, st, change))
		require.NoError(t, st.Maintain(t.Context(), 0))
		require.False(t, st.sums.Load())
		commit(st)
	}
}

// TestTriggersOfAnOlderVersion: an older file that was run again brings back triggers that count everything. Nobody begins to work
// beside them, and the migration puts them right.
func TestTriggersOfAnOlderVersion(t *testing.T) {
	address := ready(t)
	pgtest.Shared(t).Psql(t, address, `CREATE OR REPLACE TRIGGER tr_job_run_stat_update AFTER UPDATE ON jobs.tb_job_run
		REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION jobs.fn_stat_update()`)
	_, err := Open(t.Context(), Options{URL: address})
	require.ErrorIs(t, err, store.ErrNotReady)
	problems, err := Validate(t.Context(), Options{URL: address})
	require.NoError(t, err)
	require.Len(t, problems, 1)
	require.Equal(t, "trigger tr_job_run_stat_update of jobs.tb_job_run is that of an older version", problems[0].What)
	applied, err := Migrate(t.Context(), Options{URL: address})
	require.NoError(t, err)
	require.Equal(t, versions(t), applied)
	openAt(t, address)
}

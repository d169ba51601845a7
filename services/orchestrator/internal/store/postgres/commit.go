package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// commitTries is how often a commit is tried that others were in the way of.
const commitTries = 5

// Commit implements [store.Store]. All records go to the server in one round trip, the COMMIT with
// them: a statement that does not change all that it means to change fails, and the rest with it. Then
// the records are done one by one, to find those that cannot be written. The context counts until
// the first byte is sent.
func (s *Store) Commit(ctx context.Context, records []*store.Record) ([]error, error) {
	if len(records) == 0 {
		return nil, nil
	}
	var results []error
	rowIDs := map[*store.Record]string{}
	taken := map[*store.Take]store.TakeResult{}
	var err error
	for range commitTries {
		clear(rowIDs)
		clear(taken)
		err = s.within(ctx, s.writers, func(bounded context.Context, c *pgx.Conn) error {
			// From here on the outcome has to be known, whatever the caller's context says.
			within, cancel := context.WithTimeout(context.WithoutCancel(bounded), s.timeout)
			defer cancel()
			results = make([]error, len(records))
			err := s.settle(within, c)
			if err != nil {
				return err
			}
			defer func() {
				if err != nil && c.IsClosed() {
					s.doubt(c)
				}
			}()
			err = s.commitAtOnce(within, c, records, rowIDs, taken)
			if err != nil && s.findLosers(err, records) {
				clear(rowIDs)
				clear(taken)
				err = s.commitEach(within, c, records, results, rowIDs, taken)
			}
			return err
		})
		if e, ok := ofServer(err); !ok || e.Code != codeDeadlock && e.Code != codeSerialize {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("commit %d records: %w", len(records), err)
	}
	for r, id := range rowIDs {
		r.InsertRow.ID = id
	}
	for t, result := range taken {
		t.Result = result
	}
	return results, nil
}

// Locks of other clients are waited for this long by a batch of records, then by each of them; once some have waited
// in vain, the others of the batch do so for the shortest time alone.
const (
	batchLockTimeout  = 500 * time.Millisecond
	recordLockTimeout = 100 * time.Millisecond
	leastLockTimeout  = 2 * time.Millisecond
	patientRecords    = 10
)

// findLosers says whether to look for records that cannot be written, after all of them could not. Words that the
// server does not know are a record's fault only where it names columns of an entity.
func (s *Store) findLosers(err error, records []*store.Record) bool {
	if !ofRecord(err) && !isLocked(err) {
		return false
	}
	if e, ok := ofServer(err); ok && strings.HasPrefix(e.Code, "42") {
		s.forgetTables()
		return slices.ContainsFunc(records, func(r *store.Record) bool { return r.InsertRow != nil || r.UpdateRow != nil })
	}
	return true
}

// commitAtOnce writes all records, or none.
func (s *Store) commitAtOnce(ctx context.Context, c *pgx.Conn, records []*store.Record, rowIDs map[*store.Record]string, taken map[*store.Take]store.TakeResult) error {
	for _, r := range records {
		if err := check(r); err != nil {
			return err
		}
	}
	b := &pgx.Batch{}
	s.queue(b, records, true)
	for _, r := range records {
		if err := s.queueEntity(ctx, c, b, r, rowIDs); err != nil {
			return err
		}
	}
	queueLimits(b, records, taken)
	err := c.SendBatch(ctx, b).Close()
	if err != nil && !c.IsClosed() && c.PgConn().TxStatus() != 'I' {
		if _, undo := c.Exec(ctx, "ROLLBACK"); undo != nil {
			return errors.Join(err, undo)
		}
	}
	return err
}

// commitEach writes the records one by one, in one transaction, and leaves out those that fail.
func (s *Store) commitEach(ctx context.Context, c *pgx.Conn, records []*store.Record, results []error, rowIDs map[*store.Record]string, taken map[*store.Take]store.TakeResult) error {
	tx, err := c.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }() // after a commit it does nothing
	if err := setLockTimeout(ctx, c, recordLockTimeout); err != nil {
		return err
	}
	if _, err := c.Exec(ctx, leaveRules); err != nil {
		return err
	}
	waited := 0
	for i, r := range records {
		ofRow, err := s.commitOne(ctx, c, r, rowIDs, taken)
		if err == nil {
			continue
		}
		delete(rowIDs, r)
		if !s.findLosers(err, records[i:i+1]) {
			return err
		}
		if c.PgConn().TxStatus() == 'E' {
			if _, undo := tx.Exec(ctx, "ROLLBACK TO SAVEPOINT record"); undo != nil {
				return errors.Join(err, undo)
			}
		}
		reason, err := explain(ctx, tx, r, ofRow, err)
		if err != nil {
			return err
		}
		results[i] = fmt.Errorf("run %s: %w", r.RunID, reason)
		if errors.Is(reason, store.ErrBusy) {
			if waited++; waited == patientRecords {
				if err := setLockTimeout(ctx, c, leastLockTimeout); err != nil {
					return err
				}
			}
		}
	}
	return tx.Commit(ctx)
}

// setLockTimeout bounds, until the end of the transaction, how long a statement waits for a lock.
func setLockTimeout(ctx context.Context, c *pgx.Conn, d time.Duration) error {
	_, err := c.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", d.Milliseconds()), pgx.QueryExecModeSimpleProtocol)
	return err
}

// commitOne writes one record behind a savepoint. Its entity's row comes last and apart, so that what is
// wrong with it can be told from the rest. Constraints are checked now, whatever they would wait for.
func (s *Store) commitOne(ctx context.Context, c *pgx.Conn, r *store.Record, rowIDs map[*store.Record]string, taken map[*store.Take]store.TakeResult) (ofRow bool, err error) {
	if err := check(r); err != nil {
		return false, err
	}
	// Apart from the rest, which may have to be prepared first, and wait for a lock on a table then.
	if _, err := c.Exec(ctx, "SAVEPOINT record"); err != nil {
		return false, err
	}
	b := &pgx.Batch{}
	s.queue(b, []*store.Record{r}, false)
	if r.InsertRow == nil && r.UpdateRow == nil {
		queueLimits(b, []*store.Record{r}, taken)
		b.Queue("RELEASE SAVEPOINT record")
		return false, c.SendBatch(ctx, b).Close()
	}
	if err := c.SendBatch(ctx, b).Close(); err != nil {
		return false, err
	}
	b = &pgx.Batch{}
	err = s.queueEntity(ctx, c, b, r, rowIDs)
	if err == nil {
		b.Queue("SET CONSTRAINTS ALL IMMEDIATE")
		b.Queue("SET CONSTRAINTS ALL DEFERRED")
		queueLimits(b, []*store.Record{r}, taken)
		b.Queue("RELEASE SAVEPOINT record")
		return true, c.SendBatch(ctx, b).Close()
	}
	if _, undo := c.Exec(ctx, "ROLLBACK TO SAVEPOINT record"); undo != nil {
		return true, errors.Join(err, undo)
	}
	return true, err
}

// check refuses records that mix runs, and ids that are none.
func check(r *store.Record) error {
	switch {
	case r.RunID == "":
		return invalidf("the record names no run")
	case r.Create != nil && r.Create.ID != r.RunID:
		return invalidf("the record creates another run, %s", r.Create.ID)
	case !isUUID(r.RunID) && r.Create == nil:
		return invalid(store.ErrNotFound)
	case !isUUID(r.RunID):
		return invalidf("%w: the id of a run is a UUID", store.ErrRefused)
	}
	for n, jobs := range [][]*store.Job{r.NewJobs, r.ChangedJobs} {
		for _, j := range jobs {
			switch {
			case j.RunID != r.RunID:
				return invalidf("job %s belongs to another run, %s", j.ID, j.RunID)
			case !isUUID(j.ID) && n == 0:
				return invalidf("%w: job %s: the id of a job is a UUID", store.ErrRefused, j.ID)
			case !isUUID(j.ID):
				return invalidf("job %s: %w", j.ID, store.ErrNotFound)
			}
		}
	}
	for _, st := range r.Steps {
		if st.RunID != r.RunID {
			return invalidf("step %s belongs to another run, %s", st.StepPath, st.RunID)
		}
	}
	if err := checkBounds(r); err != nil {
		return err
	}
	return checkLimits(r)
}

// queue adds the statements of records, but for entities' rows: a few for all of them, rows in the order of their ids so that two
// orchestrators that write the same rows wait for each other rather than deadlock. Where keep allows it, and all records are as usual, what
// the triggers of jobs would see to is seen to here.
func (s *Store) queue(b *pgx.Batch, records []*store.Record, keep bool) {
	runs := s.queueRuns(b, records)
	var fresh, full, adopted, changed []*store.Job
	var steps []*store.Step
	var signals []taken
	for _, r := range records {
		for _, j := range r.NewJobs {
			switch {
			case j.Adopted:
				adopted = append(adopted, j)
			case atStart(j):
				fresh = append(fresh, j)
			default:
				full = append(full, j)
			}
		}
		changed = append(changed, r.ChangedJobs...)
		steps = append(steps, r.Steps...)
		for id, path := range r.TakenSignals {
			signals = append(signals, taken{id, r.RunID, path})
		}
	}
	ended := waves(changed, func(j *store.Job) string { return j.ID })
	for _, wave := range ended {
		slices.SortFunc(wave, func(a, b *store.Job) int { return cmp.Compare(a.ID, b.ID) })
	}
	// A statement does not see what it inserts itself, nor what comes behind it.
	apart := len(ended) > 1 || overlap(fresh, changed) || overlap(full, changed) || overlap(adopted, changed)
	kept := keep && !apart && s.sums.Load() && !slices.ContainsFunc(records, func(r *store.Record) bool { return !keepsRules(r) })
	if keep && !kept {
		b.Queue(leaveRules)
	}
	if apart {
		s.queueParts(b, runs, nil, nil, false)
		queueRows(b, s.sql.insertNewJobs, newJobColumns, fresh, false)
	} else {
		s.queueParts(b, runs, fresh, changed, kept)
		ended = nil
	}
	queueRows(b, s.sql.insertJobs, fullJobColumns, full, false)
	queueRows(b, s.sql.adoptJobs, adoptColumns, adopted, true)
	for _, wave := range ended {
		queueRows(b, s.sql.updateJobs, changeJobColumns, wave, true)
	}
	for _, wave := range waves(steps, func(st *store.Step) string { return fmt.Sprintf("%s/%s#%d", st.RunID, st.StepPath, st.Generation) }) {
		queueRows(b, s.sql.upsertSteps, stepColumns, wave, false)
	}
	for _, wave := range waves(signals, func(t taken) string { return fmt.Sprint(t.id) }) {
		slices.SortFunc(wave, func(a, b taken) int { return cmp.Compare(a.id, b.id) })
		queueRows(b, s.sql.takeSignals, takenColumns, wave, true)
	}
}

// leaveRules has the triggers see to all that a statement does, until the end of the transaction.
const leaveRules = "SELECT set_config('specql.checked', 'yes', true)"

// overlap says whether a job is in both lists.
func overlap(a, b []*store.Job) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	ids := make(map[string]bool, len(a))
	for _, j := range a {
		ids[j.ID] = true
	}
	return slices.ContainsFunc(b, func(j *store.Job) bool { return ids[j.ID] })
}

// queueRows adds one statement over rows; counted ones have to change as many.
func queueRows[T any](b *pgx.Batch, text string, columns []column[T], rows []T, counted bool) {
	if len(rows) == 0 {
		return
	}
	args := arguments(columns, rows)
	if counted {
		args = append(args, len(rows))
	}
	b.Queue(text, args...)
}

// waves splits items so that none of the parts has a key twice; the items of one key stay in their order.
func waves[T any](items []T, key func(T) string) [][]T {
	if len(items) < 2 {
		if len(items) == 0 {
			return nil
		}
		return [][]T{items}
	}
	var out [][]T
	seen := make(map[string]int, len(items))
	for _, item := range items {
		k := key(item)
		n := seen[k]
		seen[k]++
		if n == len(out) {
			out = append(out, nil)
		}
		out[n] = append(out[n], item)
	}
	return out
}

// notBuried fails where one of the owners was buried. A run that is created while its owner is being buried was created before.
const notBuried = "jobs.fn_expect((SELECT count(*) FROM jobs.tb_orchestrator WHERE id = ANY ($1::text[]) AND buried_at IS NOT NULL), 0, 'buried')"

// queueRuns sorts the fences, with what the records change in their runs: several records of one run become one change where only
// one of them says more than its sequence. It adds the statements that have to come first, and returns the last changes.
func (s *Store) queueRuns(b *pgx.Batch, records []*store.Record) runParts {
	var creates []*store.Record
	var changes []*change
	last := map[string]*change{}
	for _, r := range records {
		if r.Create != nil {
			creates = append(creates, r)
			if r.Run == nil {
				continue
			}
		}
		if r.Run == nil {
			if l := last[r.RunID]; l != nil && l.record.Epoch == r.Epoch {
				l.sequence = max(l.sequence, r.Sequence)
				continue
			}
		}
		c := &change{record: r, sequence: r.Sequence}
		last[r.RunID] = c
		changes = append(changes, c)
	}
	if slices.ContainsFunc(creates, func(r *store.Record) bool { return last[r.RunID] != nil }) {
		b.Queue("SELECT "+notBuried, ownersOf(creates))
		queueRows(b, s.sql.createRuns, runColumns, creates, false)
		creates = nil
	}
	all := waves(changes, func(c *change) string { return c.record.RunID })
	parts := runParts{created: creates}
	for i, wave := range all {
		slices.SortFunc(wave, func(a, b *change) int { return cmp.Compare(a.record.RunID, b.record.RunID) })
		var retried []*change
		for _, c := range wave {
			switch {
			case c.record.Run == nil:
				parts.touched = append(parts.touched, c)
			case c.record.Run.Retry:
				retried = append(retried, c)
			default:
				parts.changed = append(parts.changed, c)
			}
		}
		queueRows(b, s.sql.retryRuns, retryColumns, retried, true)
		if i < len(all)-1 {
			s.queueParts(b, parts, nil, nil, false)
			parts = runParts{}
		}
	}
	return parts
}

// ownersOf names the owners of runs that are created, each once.
func ownersOf(creates []*store.Record) []string {
	owners := gather(creates, func(r *store.Record) string { return r.Create.Owner })
	slices.Sort(owners)
	return slices.Compact(owners)
}

// runParts are changes of runs that no two of are of the same run.
type runParts struct {
	created          []*store.Record
	touched, changed []*change
}

// queueParts adds one statement for all, which have no run and no job twice. Where kept, it does what the triggers of jobs would.
func (s *Store) queueParts(b *pgx.Batch, runs runParts, begun, ended []*store.Job, kept bool) {
	p := stepParts{touch: len(runs.touched) > 0, change: len(runs.changed) > 0, end: len(ended) > 0, kept: kept && len(ended) > 0, begin: len(begun) > 0, create: len(runs.created) > 0}
	var sums []*jobSum
	if p.kept {
		sums = sumJobs(ended, s.now())
		p.sum = len(sums) > 0
	}
	if p == (stepParts{}) {
		return
	}
	p.single = max(len(runs.touched), len(runs.changed), len(ended), len(begun), len(runs.created)) == 1
	var args []any
	if p.touch {
		args = append(appendArguments(args, touchColumns, runs.touched, p.single), len(runs.touched))
	}
	if p.change {
		args = append(appendArguments(args, changeColumns, runs.changed, p.single), len(runs.changed))
	}
	if p.end {
		args = append(appendArguments(args, changeJobColumns, ended, p.single), len(ended))
	}
	if p.sum {
		args = append(args, rowsOf(sums, s.sql.sumColumns))
	}
	if p.begin {
		args = appendArguments(args, newJobColumns, begun, p.single)
	}
	if p.create {
		args = append(appendArguments(args, runColumns, runs.created, p.single), ownersOf(runs.created))
	}
	b.Queue(s.sql.step(p), args...)
	for _, c := range runs.changed {
		if m := c.record.Run.Admit; m != nil {
			b.Queue(`UPDATE jobs.tb_workflow_run SET snapshot = $2, entity_id = $3, entity_schema = $4,
					entity_row = $5::text::jsonb, input_data = $6::text::jsonb WHERE id = $1`,
				uuidValue(c.record.RunID), nullText(m.Snapshot), nullText(m.EntityID), nullText(m.EntitySchema), nullJSON(m.EntityRow), nullJSON(m.Input))
		}
	}
}

// explain turns what the server refused in a record into what the interface says of it.
func explain(ctx context.Context, q pgx.Tx, r *store.Record, ofRow bool, err error) (reason, failed error) {
	if e, ok := errors.AsType[*recordError](err); ok {
		return e.err, nil
	}
	e, ok := ofServer(err)
	if !ok {
		return nil, err
	}
	if isLocked(err) {
		return fmt.Errorf("%w: %w", store.ErrBusy, err), nil
	}
	// The table's own triggers may raise any code, those of the schema jobs too.
	if ofRow && (e.Code != codeExpect || r.UpdateRow == nil || !strings.HasPrefix(e.Message, "row:")) {
		row := r.InsertRow
		if row == nil || r.UpdateRow != nil && e.TableName == r.UpdateRow.Entity {
			row = r.UpdateRow
		}
		return asRowError(row.Entity, row.ID, err), nil
	}
	switch e.Code {
	case codeState:
		return fmt.Errorf("%w: %s", store.ErrState, e.Message), nil
	case codeExpect:
		return explainCount(ctx, q, r, e)
	case codeForeignKey:
		return fmt.Errorf("%w: %s", store.ErrNotFound, e.Message), nil
	case codeUnique:
		switch e.ConstraintName {
		case "tb_workflow_run_pkey":
			return &store.DuplicateError{RunID: r.RunID}, nil
		case "ux_workflow_run_idempotency_key":
			id, err := one(ctx, q, pgx.RowTo[string], `SELECT id::text FROM jobs.tb_workflow_run
				WHERE idempotency_key IS NOT NULL AND coalesce(tenant_id, '') = $1 AND idempotency_key = $2`, r.Create.TenantID, r.Create.IdempotencyKey)
			if err != nil {
				return nil, err
			}
			return &store.DuplicateError{RunID: id}, nil
		}
		return fmt.Errorf("%w: it exists already: %s", store.ErrState, e.Message), nil
	}
	return fmt.Errorf("%w: %w", store.ErrRefused, err), nil
}

// explainCount says which row a statement did not find as it had to be.
func explainCount(ctx context.Context, q pgx.Tx, r *store.Record, e *pgconn.PgError) (reason, failed error) {
	switch what, _, _ := strings.Cut(e.Message, ":"); what {
	case "buried":
		return fmt.Errorf("%w: its owner %s was taken for dead", store.ErrFenced, r.Create.Owner), nil
	case "fence":
		epoch, err := one(ctx, q, pgx.RowTo[int64], "SELECT epoch FROM jobs.tb_workflow_run WHERE id = $1", uuidValue(r.RunID))
		if errors.Is(err, store.ErrNotFound) {
			return store.ErrNotFound, nil
		}
		if err != nil {
			return nil, err
		}
		return fmt.Errorf("%w: its epoch is %d, the record's %d", store.ErrFenced, epoch, r.Epoch), nil
	case "adopt":
		return fmt.Errorf("%w: the job is no longer pending, or belongs to a run", store.ErrState), nil
	case "job":
		return fmt.Errorf("a changed job: %w", store.ErrNotFound), nil
	case "row":
		return fmt.Errorf("%s %s: %w", r.UpdateRow.Entity, r.UpdateRow.ID, store.ErrNotFound), nil
	case "signal":
		var numbers []int64
		for id := range r.TakenSignals {
			numbers = append(numbers, id)
		}
		found, err := one(ctx, q, pgx.RowTo[int64], "SELECT count(*) FROM jobs.tb_workflow_signal WHERE id = ANY ($1) AND run_id = $2", numbers, uuidValue(r.RunID))
		switch {
		case err != nil:
			return nil, err
		case found < int64(len(numbers)):
			return fmt.Errorf("a signal: %w", store.ErrNotFound), nil
		}
		return fmt.Errorf("a signal: %w: another step has taken it", store.ErrState), nil
	}
	return fault.New(fault.Internal, "%s", e.Message), nil
}

// Package storetest holds every database to the duties of [store.Store]: one suite, run by
// the tests of each database.
package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Option adds what a database can do beyond the interface.
type Option func(*suite)

// RawSQL lets the suite run statements past the store, to see that the database itself
// refuses what must not happen.
func RawSQL(exec func(t *testing.T, st store.Store, statement string) error) Option {
	return func(s *suite) { s.rawSQL = exec }
}

// MaxLogLines says that open makes stores with another bound than [store.MaxLogLines].
func MaxLogLines(n int) Option {
	return func(s *suite) { s.maxLogLines = n }
}

// ManyOwners says that several owners work in the database at the same time, and that other clients write to it.
func ManyOwners() Option {
	return func(s *suite) { s.manyOwners = true }
}

// suite is what the tests share.
type suite struct {
	open   func(*testing.T) store.Store
	rawSQL func(*testing.T, store.Store, string) error
	// maxLogLines is the bound of lines of one run.
	maxLogLines int
	// manyOwners is the database of many orchestrators, in contrast to an embedded one.
	manyOwners bool
}

// Run tests a database. open makes an empty one for each test; the suite does not close it.
func Run(t *testing.T, open func(*testing.T) store.Store, options ...Option) {
	s := &suite{open: open, maxLogLines: store.MaxLogLines}
	for _, o := range options {
		o(s)
	}
	tests := []struct {
		name string
		run  func(*testing.T, store.Store)
	}{
		{"RunRoundTrip", testRunRoundTrip},
		{"JobRoundTrip", testJobRoundTrip},
		{"StepRoundTrip", testStepRoundTrip},
		{"OneRecordHoldsAll", testOneRecordHoldsAll},
		{"NewJobThatChanged", testNewJobThatChanged},
		{"RunChange", testRunChange},
		{"Retry", testRetry},
		{"Fencing", testFencing},
		{"LoserLeavesNothing", testLoserLeavesNothing},
		{"IdempotencyKey", testIdempotencyKey},
		{"IdempotencyKeysInOneBatch", testIdempotencyKeysInOneBatch},
		{"SameRunTwice", testSameRunTwice},
		{"OneWayStates", testOneWayStates},
		{"OneWayStatesInSQL", s.testOneWayStatesInSQL},
		{"ForeignRecords", testForeignRecords},
		{"NotFound", testNotFound},
		{"JobsAfter", testJobsAfter},
		{"Runs", testRuns},
		{"Claim", testClaim},
		{"ClaimRun", testClaimRun},
		{"Owned", testOwned},
		{"RequestCancel", testRequestCancel},
		{"Signals", testSignals},
		{"Logs", testLogs},
		{"LogBound", s.testLogBound},
		{"Snapshots", testSnapshots},
		{"Entities", testEntities},
		{"EntityColumns", testEntityColumns},
		{"EntityConstraints", testEntityConstraints},
		{"EntityCountedKey", testEntityCountedKey},
		{"EntityHostileNames", testEntityHostileNames},
		{"HostileText", testHostileText},
		{"LargePayload", testLargePayload},
		{"CancelledContext", testCancelledContext},
		{"ConcurrentCommits", testConcurrentCommits},
		{"ConcurrentKeys", testConcurrentKeys},
		{"ConcurrentClaims", testConcurrentClaims},
		{"ConcurrentEverything", testConcurrentEverything},
		{"Journal", testJournal},
		{"Closed", testClosed},
		{"Heartbeat", testHeartbeat},
		{"ClaimsOfTheDead", s.testClaimsOfTheDead},
		{"Release", testRelease},
		{"RunStates", testRunStates},
		{"Requests", testRequests},
		{"ExecutionTypes", testExecutionTypes},
		{"Maintain", testMaintain},
		{"Admit", testAdmit},
		{"FrontDoor", s.testFrontDoor},
		{"RolledBack", s.testRolledBack},
		{"ConcurrentAdoption", s.testConcurrentAdoption},
		{"Alerts", testAlerts},
		{"WindowFigures", testWindowFigures},
		{"Denials", testDenials},
		{"Listen", s.testListen},
		{"ListenEnds", testListenEnds},
		{"Insight", testInsight},
		{"Limits", testLimits},
		{"LimitsTogether", testLimitsTogether},
		{"LimitCost", testLimitCost},
		{"LimitOfTheDead", testLimitOfTheDead},
		{"LimitClosed", testLimitClosed},
		{"LimitFold", testLimitFold},
		{"LimitMaintain", testLimitMaintain},
		{"ConcurrentTakes", testConcurrentTakes},
		{"HostileLimits", testHostileLimits},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// owner and tenants of the tests.
const (
	owner   = "orchestrator-a"
	tenant  = "6a8f9d0e-0000-4000-8000-000000000001"
	tenant2 = "6a8f9d0e-0000-4000-8000-000000000002"
)

// day is when everything happens.
var day = time.Date(2026, 3, 14, 15, 9, 26, 535897000, time.UTC)

func newID() string { return uuid.Must(uuid.NewV7()).String() }

// newRun is a running run with little in it.
func newRun() *store.Run {
	return &store.Run{ID: newID(), Action: "act", Status: store.Running, Owner: owner, Epoch: 1, Sequence: 1, CreatedAt: day, StartedAt: day}
}

// fullRun has every field set.
func fullRun() *store.Run {
	return &store.Run{
		ID: newID(), Entity: "payment", Action: "process", EntitySchema: "commerce", EntityID: newID(),
		EntityRow: json.RawMessage(`{"amount": 12}`), Status: store.Failed, Input: json.RawMessage(`{"a": [1, "ü"]}`), Output: json.RawMessage(`{"b": null}`),
		Err:      &fault.Error{Code: fault.RemoteError, Message: "it said 'no'", Retryable: true, Attempts: 3},
		Snapshot: "abc123", IdempotencyKey: "key-" + newID(), CorrelationID: "corr", TenantID: tenant, Subject: newID(),
		Owner: owner, Epoch: 7, Retries: 2, Sequence: 41, CancelRequested: true, CancelReason: "enough",
		CreatedAt: day, StartedAt: day.Add(time.Millisecond), CompletedAt: day.Add(time.Second),
	}
}

var jobNumber atomic.Int64

// newJob is a running job with little in it.
func newJob(run *store.Run) *store.Job {
	return &store.Job{
		ID: newID(), RunID: run.ID, StepPath: fmt.Sprintf("steps[%d]", jobNumber.Add(1)), Service: "api", Operation: "call", ExecutionType: "http",
		Status: store.Running, Attempts: 1, MaxAttempts: 4, Sequence: 2, CreatedAt: day, StartedAt: day,
	}
}

// fullJob has every field set.
func fullJob(run *store.Run) *store.Job {
	return &store.Job{
		ID: newID(), RunID: run.ID, StepPath: "steps[0].branches[1]", Generation: 2, IdempotencyKey: newID(),
		Service: "stripe_api", Operation: "charge", ExecutionType: "docker",
		RunnerConfig: json.RawMessage(`{"image": "x"}`), Input: json.RawMessage(`{"n": 1}`), Output: json.RawMessage(`[1, 2]`),
		Err:           &fault.Error{Code: fault.Timeout, Message: "too long", Retryable: true, Attempts: 2},
		ResourceUsage: json.RawMessage(`{"cpu_seconds": 1.5}`), SecurityContext: json.RawMessage(`{"checks": []}`),
		Status: store.Failed, Attempts: 2, MaxAttempts: 4, Timeout: 1500 * time.Millisecond, NextAttemptAt: day.Add(time.Hour),
		Sequence: 9, TenantID: tenant, TriggeredBy: newID(), CorrelationID: "corr", EntityType: "payment", EntityPK: newID(),
		CreatedAt: day, StartedAt: day.Add(time.Millisecond), CompletedAt: day.Add(time.Second),
	}
}

// commit writes records that must all succeed.
func commit(t *testing.T, st store.Store, records ...*store.Record) {
	t.Helper()
	for i, err := range commitAll(t, st, records...) {
		require.NoError(t, err, "record %d", i)
	}
}

// commitAll writes records and returns their errors.
func commitAll(t *testing.T, st store.Store, records ...*store.Record) []error {
	t.Helper()
	results, err := st.Commit(t.Context(), records)
	require.NoError(t, err)
	require.Len(t, results, len(records))
	return results
}

// commitOne writes one record and returns its error.
func commitOne(t *testing.T, st store.Store, r *store.Record) error {
	t.Helper()
	return commitAll(t, st, r)[0]
}

// create is the record that creates a run.
func create(run *store.Run) *store.Record {
	return &store.Record{RunID: run.ID, Epoch: run.Epoch, Sequence: run.Sequence, Create: run}
}

// change is a record of a run that exists.
func change(run *store.Run) *store.Record {
	return &store.Record{RunID: run.ID, Epoch: run.Epoch, Sequence: run.Sequence + 1}
}

// started commits a new running run.
func started(t *testing.T, st store.Store) *store.Run {
	t.Helper()
	run := newRun()
	commit(t, st, create(run))
	return run
}

// ended commits a run in a final state.
func ended(t *testing.T, st store.Store, status store.Status) *store.Run {
	t.Helper()
	run := newRun()
	run.Status, run.CompletedAt = status, day.Add(time.Second)
	if status == store.Failed {
		run.Err = fault.New(fault.RemoteError, "no")
	}
	commit(t, st, create(run))
	return run
}

func load(t *testing.T, st store.Store, id string) *store.Run {
	t.Helper()
	run, err := st.Run(t.Context(), id)
	require.NoError(t, err)
	return run
}

func history(t *testing.T, st store.Store, id string) *store.History {
	t.Helper()
	h, err := st.History(t.Context(), id)
	require.NoError(t, err)
	return h
}

// asStored compares what went in with what came out: JSON by its meaning.
var asStored = cmp.Options{
	cmp.Comparer(func(a, b json.RawMessage) bool {
		if len(a) == 0 || len(b) == 0 {
			return len(a) == len(b)
		}
		var x, y any
		return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && cmp.Equal(x, y)
	}),
}

func requireEqual(t *testing.T, want, got any) {
	t.Helper()
	require.Empty(t, cmp.Diff(want, got, asStored))
}

// withFields are the errors that a record may have.
func requireDuplicate(t *testing.T, err error, first string) {
	t.Helper()
	d, ok := errors.AsType[*store.DuplicateError](err)
	require.True(t, ok, "want a DuplicateError, have %v", err)
	require.Equal(t, first, d.RunID)
}

// parallel runs fn n times at once and waits.
func parallel(ctx context.Context, t *testing.T, n int, fn func(ctx context.Context, i int) error) {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- fn(ctx, i) }()
	}
	for range n {
		require.NoError(t, <-errs)
	}
}

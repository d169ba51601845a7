// Package store holds the records that the orchestrator keeps and the duties of the
// databases that keep them. The databases are the packages below; one suite, storetest,
// holds all of them to what is written here.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
)

// Status is the state of a run, a job or a step.
type Status string

// The states. They move one way: pending, running, then one of the last three. Only a
// retry sets a failed or cancelled run to running again, and raises Run.Retries with it.
const (
	Pending   Status = "pending"
	Running   Status = "running"
	Completed Status = "completed"
	Failed    Status = "failed"
	Cancelled Status = "cancelled"
)

// Final reports whether nothing follows a state.
func (s Status) Final() bool { return s == Completed || s == Failed || s == Cancelled }

// Errors of a store. They come wrapped.
var (
	// ErrNotFound: there is no such run, row or snapshot.
	ErrNotFound = errors.New("not found")
	// ErrFenced: the epoch of a write is not that of the run's owner. Nothing was written.
	ErrFenced = errors.New("the run belongs to another owner")
	// ErrState: the write would move a state backwards. Nothing was written.
	ErrState = errors.New("the state does not allow this")
	// ErrRefused: the database does not take what the record holds, now or later. Nothing was written.
	ErrRefused = errors.New("the database refuses the record")
	// ErrUnavailable: the database cannot be reached, or is starting or stopping. What was
	// asked may succeed later; whether a commit took effect is not known.
	ErrUnavailable = errors.New("the database is not available")
	// ErrNotReady: the schema is not yet the one that this program needs.
	ErrNotReady = errors.New("the database is not ready")
	// ErrBusy: another client of the database holds a lock on what the record changes. Nothing
	// was written; it may be later.
	ErrBusy = errors.New("another client of the database holds a lock")
	// ErrFull: as many signals wait for the run as are kept. Nothing was written; it may be later.
	ErrFull = errors.New("too many signals wait for the run")
	// ErrClosed: the store or the journal is closed.
	ErrClosed = errors.New("closed")
)

// What waits for one run at most, about: several that come at the same moment may all find room.
const (
	MaxSignals     = 1000
	MaxSignalBytes = 8 << 20
)

// DuplicateError says that an idempotency key belongs to a run already.
type DuplicateError struct {
	// RunID is the first run with the key.
	RunID string
}

// Error implements error.
func (e *DuplicateError) Error() string {
	return fmt.Sprintf("the idempotency key belongs to run %s", e.RunID)
}

// StateError is [ErrState], with the state that a run is in.
type StateError struct{ Status Status }

// Error implements error.
func (e *StateError) Error() string { return fmt.Sprintf("%v: it is %s", ErrState, e.Status) }

// Is says that this is [ErrState].
func (e *StateError) Is(target error) bool { return target == ErrState }

// SignalRefused is what AddSignal fails with, given what there is to say of the run: one that goes on has too many signals.
func SignalRefused(err error) error {
	if state, ok := errors.AsType[*StateError](err); ok && !state.Status.Final() {
		return ErrFull
	}
	return err
}

// Run is a row of tb_workflow_run.
type Run struct {
	ID     string
	Entity string
	Action string
	// EntitySchema is the schema of the entity's table; empty without an entity.
	EntitySchema string
	// EntityID is the primary key of the entity's row; empty where the action uses none.
	EntityID string
	// EntityRow is the row as it was when the run began, a JSON object; nil for none.
	EntityRow json.RawMessage
	Status    Status
	Input     json.RawMessage
	Output    json.RawMessage
	Err       *fault.Error
	// Snapshot is the digest of the documents that the run began with.
	Snapshot       string
	IdempotencyKey string
	CorrelationID  string
	TenantID       string
	Subject        string
	// Traceparent is the span that the run belongs to, as in W3C Trace Context; empty for none.
	Traceparent string
	// Owner is the orchestrator that walks the run; Epoch grows with each change of owner.
	Owner string
	Epoch int64
	// Retries counts RetryRun.
	Retries int
	// Sequence is the highest sequence given to a change of the run, its jobs and steps.
	Sequence int64
	// CancelReason is set where someone asked for the end; CancelRequested tells it from an empty reason.
	CancelRequested bool
	CancelReason    string
	CreatedAt       time.Time
	StartedAt       time.Time // zero until then
	CompletedAt     time.Time // zero until then
}

// Job is a row of tb_job_run: one call.
type Job struct {
	ID    string
	RunID string
	// StepPath is the key of the call in its run: the path in the plan, with iterations.
	StepPath string
	// Generation counts, from 0, the jobs of one step path: a retried run makes a new job
	// for the step that failed.
	Generation     int
	IdempotencyKey string
	Service        string
	Operation      string
	ExecutionType  string
	RunnerConfig   json.RawMessage
	Input          json.RawMessage
	Output         json.RawMessage
	// OutputValue is what Output was read as, with numbers as json.Number; nil where another process read it. It is not changed any more.
	OutputValue any
	Err         *fault.Error
	// ResourceUsage and SecurityContext are the protos in JSON with proto field names; nil until known.
	ResourceUsage   json.RawMessage
	SecurityContext json.RawMessage
	// Usage and Security are what the two were made of, nil where another process did. They are not changed any more.
	Usage    *runnerv1.ResourceUsage
	Security *runnerv1.SecurityContext

	Status      Status
	Attempts    int
	MaxAttempts int
	Timeout     time.Duration
	// NextAttemptAt is when the next attempt may begin; zero for at once.
	NextAttemptAt time.Time
	Sequence      int64
	// Adopted says, in Record.NewJobs, that the row is there already: [Store.ClaimJobs] gave it.
	Adopted       bool
	TenantID      string
	TriggeredBy   string
	CorrelationID string
	EntityType    string
	EntityPK      string
	CreatedAt     time.Time
	StartedAt     time.Time
	CompletedAt   time.Time
}

// Identifier is the value of tb_job_run.identifier, unique over all jobs.
func (j *Job) Identifier() string {
	return fmt.Sprintf("%s/%s#%d", j.RunID, j.StepPath, j.Generation)
}

// Step is a row of tb_workflow_step: a step other than a call that has to be remembered,
// such as a wait. Its key is (RunID, StepPath, Generation).
type Step struct {
	RunID      string
	StepPath   string
	Generation int
	// Kind is wait, await_signal, update, or foreach.
	Kind   string
	Status Status
	// Until is when the step ends by itself; zero for never.
	Until time.Time
	// Name is the signal's name of an await_signal.
	Name string
	// Data is what the step gave, as JSON; nil for nothing.
	Data        json.RawMessage
	Err         *fault.Error
	Sequence    int64
	StartedAt   time.Time
	CompletedAt time.Time
}

// Signal is a row of tb_workflow_signal.
type Signal struct {
	// ID grows in the order of arrival; set by the store.
	ID        int64
	RunID     string
	Name      string
	Payload   json.RawMessage
	CreatedAt time.Time
	// TakenBy is the step path that took it; empty while it waits.
	TakenBy string
}

// LogLine is a row of tb_job_log.
type LogLine struct {
	RunID    string
	Sequence int64
	JobID    string
	StepPath string
	Attempt  int
	Line     int64
	Stream   string
	Text     string
	Time     time.Time
}

// EntityRow is a row of an entity's table. Values are JSON-like and already checked.
type EntityRow struct {
	Schema string
	Entity string
	ID     string
	Values map[string]any
}

// RunChange sets columns of a run. Nil and zero fields stay as they are.
type RunChange struct {
	Status      Status
	Output      json.RawMessage
	Err         *fault.Error
	StartedAt   time.Time
	CompletedAt time.Time
	// Retry sets a failed or cancelled run to running again: Status is Running, Retries grows
	// by one, and output, error, completed_at and the cancel request are cleared.
	Retry bool
	// Admit fills in what a run lacks that was inserted by SQL; nil for any other.
	Admit *Admission
}

// Admission is what a pending run gets that a client inserted by SQL, which knows neither
// plans nor defaults. Each field is set as it is.
type Admission struct {
	Snapshot string
	EntityID string
	// EntitySchema, EntityRow and Input as in [Run].
	EntitySchema string
	EntityRow    json.RawMessage
	Input        json.RawMessage
}

// RunState is what tells whether a run has changed, and whose it is.
type RunState struct {
	Status   Status
	Owner    string
	Epoch    int64
	Sequence int64
	// LogSequence is the highest sequence of a log line; 0 for none.
	LogSequence int64
}

// Requests are what was asked of runs of one owner, by whichever orchestrator.
type Requests struct {
	// Cancels are the reasons by run, of runs that have not ended.
	Cancels map[string]string
	// Signals are those that no step has taken, of runs that have not ended, oldest first.
	Signals []*Signal
}

// ExecutionType is what was set for an execution type.
type ExecutionType struct {
	Enabled   bool
	ChangedAt time.Time
}

// Notice says what another client of the database did.
type Notice int

// The notices. One may come without a cause, and several causes may come as one.
const (
	// NoticeWork: there may be pending jobs or runs that nobody owns.
	NoticeWork Notice = iota
	// NoticeRequest: a cancel was asked for, or a signal came.
	NoticeRequest
	// NoticeRegistry: the registry in force or the execution types changed.
	NoticeRegistry
)

// Record is what becomes durable at once or not at all: any set of changes of one run.
// One record holds "this step ended" together with "the next one begins".
type Record struct {
	RunID string
	// Epoch fences the record: it is written only while the run has this epoch.
	Epoch int64
	// Sequence becomes the run's sequence.
	Sequence int64
	// Create inserts the run, in the state that it says.
	Create *Run
	// InsertRow creates the run's entity row; UpdateRow sets some of its columns.
	InsertRow *EntityRow
	UpdateRow *EntityRow
	Run       *RunChange
	// NewJobs are inserted; those that are Adopted take the place of the pending row with
	// their id, which keeps its identifier and created_at (ErrState where it is not pending or
	// has a run). ChangedJobs set every column that can change after the start:
	// status, attempts, next attempt, output, error, usage, security, times, sequence.
	NewJobs     []*Job
	ChangedJobs []*Job
	// Steps are inserted, or change where their key exists.
	Steps []*Step
	// TakenSignals maps ids of signals to the step paths that took them.
	TakenSignals map[int64]string
	// Ends are the slots of attempts that have ended, and Takes those that are asked for, in this order.
	// Closures come before the takes.
	Ends     []SlotEnd
	Takes    []*Take
	Closures []Closure
}

// History is all that is known of a run, for replay.
type History struct {
	Run   *Run
	Jobs  []*Job  // by sequence of their start (created_at, id)
	Steps []*Step // by step path and generation
	// Signals are all signals of the run, oldest first.
	Signals []*Signal
}

// RunFilter chooses runs; zero fields choose all.
type RunFilter struct {
	Statuses []Status
	Entity   string
	Action   string
	// Tenants chooses what belongs to one of them, "" being what belongs to none. Nil chooses
	// all; an empty list nothing.
	Tenants []string
	// Before is the id of the last run of the page before; runs are listed newest first,
	// which is by descending id.
	Before string
	Limit  int
}

// Store is a database that keeps runs. Methods are safe for concurrent use; contexts end
// them early with nothing half done. Times are kept to the microsecond at least, in UTC.
type Store interface {
	// Commit writes records in one transaction, durably, in order. The result has an entry
	// for each record: nil, or a *DuplicateError, ErrFenced, ErrState, ErrNotFound, ErrRefused
	// or ErrBusy (wrapped), or a *fault.Error where the entity's row breaks a rule of its table, in
	// which case nothing of that record was written. The second result is the failure of the
	// whole transaction, of which then nothing was written as far as is known: with
	// ErrUnavailable it may have been, which RunStates tells.
	Commit(ctx context.Context, records []*Record) ([]error, error)

	// Run returns a run; ErrNotFound.
	Run(ctx context.Context, id string) (*Run, error)
	// RunByKey returns the run with an idempotency key; ErrNotFound.
	RunByKey(ctx context.Context, tenantID, key string) (*Run, error)
	// History returns all of a run; ErrNotFound.
	History(ctx context.Context, id string) (*History, error)
	// Jobs returns the jobs of a run whose sequence is above after, by creation.
	Jobs(ctx context.Context, runID string, after int64) ([]*Job, error)
	// Runs lists runs, newest first, without input, output and entity row.
	Runs(ctx context.Context, f RunFilter) ([]*Run, error)

	// RunStates returns the states of runs by id; ids that are no runs are left out.
	RunStates(ctx context.Context, ids []string) (map[string]RunState, error)

	// Heartbeat tells that owner lives and returns the beats of all registered owners, by
	// owner: each call raises the owner's own by one. register makes the owner known;
	// without it, ErrFenced says that the owner was buried: its runs are others' by now.
	Heartbeat(ctx context.Context, owner string, register bool) (map[string]int64, error)
	// Bury makes an owner unknown, so that its runs can be claimed, if its beat is still the
	// one that is given. It reports whether it did.
	Bury(ctx context.Context, owner string, beat int64) (bool, error)
	// Claim makes owner the owner of at most limit runs that are pending or running and
	// whose owner is not registered, or none, raises their epoch, and returns them as Runs
	// does. Runs that owner has already are left out. An embedded store has one owner at a time, so every other owner is dead.
	Claim(ctx context.Context, owner string, limit int) ([]*Run, error)
	// Release gives up runs that owner has and that have not ended: whoever claims next has
	// them. Runs of another owner stay as they are.
	Release(ctx context.Context, owner string, runIDs []string) error
	// Retire makes owner unknown and gives up all of its runs and jobs that it claimed.
	Retire(ctx context.Context, owner string) error
	// ClaimJobs returns at most limit pending jobs that a client inserted without a run,
	// oldest first, and makes them owner's, so that no other registered owner gets them. They
	// become part of a run as Adopted jobs of a record. One that no run can take has Err set.
	// An embedded store has none.
	ClaimJobs(ctx context.Context, owner string, limit int) ([]*Job, error)
	// Owned returns what owner has: the ids of its runs that have not ended, and the jobs that
	// it claimed and that are part of no run yet. It tells what a claim gave whose answer was lost.
	Owned(ctx context.Context, owner string) (runIDs []string, jobs []*Job, err error)
	// Requests returns what was asked of an owner's runs.
	Requests(ctx context.Context, owner string) (*Requests, error)
	// Listen tells of what other clients of the database do, until ctx ends or for good, in
	// which case the error says why. It reconnects by itself; fn is quick. Notices may get
	// lost, so that a caller also has to look by itself from time to time. An embedded
	// store, which has no other clients, waits for the end of ctx.
	Listen(ctx context.Context, fn func(Notice)) error
	// Maintain does what has to be done from time to time: it deletes runs and jobs that
	// ended more than retain ago (0: none) and slots that count no more, in small transactions, ends
	// slots whose jobs have ended, and puts statistics together. It does nothing where another orchestrator is at it.
	Maintain(ctx context.Context, retain time.Duration) error
	// SetExecutionTypes disables and enables execution types; calls of a disabled one fail.
	SetExecutionTypes(ctx context.Context, disable, enable []string) error
	// ExecutionTypes returns the types that were ever set, by name.
	ExecutionTypes(ctx context.Context) (map[string]ExecutionType, error)
	// ClaimRun makes owner the owner of one failed or cancelled run, for a retry, and raises
	// its epoch; ErrNotFound, ErrState.
	ClaimRun(ctx context.Context, owner, runID string) (*Run, error)
	// RequestCancel notes that a run shall end; ErrNotFound; ErrState where it has ended.
	RequestCancel(ctx context.Context, runID, reason string) error
	// AddSignal keeps a signal and sets its ID; ErrNotFound; ErrState where the run has ended; ErrFull where
	// [MaxSignals] that no step has taken wait for it, or those that wait have [MaxSignalBytes].
	AddSignal(ctx context.Context, s *Signal) error

	// AppendLogs keeps lines. Lines of one run have growing sequences; at most MaxLogLines of a run are
	// kept, later ones are left out.
	AppendLogs(ctx context.Context, lines []*LogLine) error
	// Logs returns lines of a run with a sequence above after, at most limit, oldest first.
	Logs(ctx context.Context, runID string, after int64, limit int) ([]*LogLine, error)

	// SaveSnapshot keeps a document under its digest, once. Snapshot returns it; ErrNotFound.
	SaveSnapshot(ctx context.Context, digest string, content []byte) error
	Snapshot(ctx context.Context, digest string) ([]byte, error)
	// SetRegistry notes the digest of the snapshot in force; Registry returns it; ErrNotFound.
	SetRegistry(ctx context.Context, digest string) error
	Registry(ctx context.Context) (digest string, appliedAt time.Time, err error)

	// EnsureEntities makes the tables of entities from their fields: a missing table is created, a
	// missing column added, nothing is dropped.
	EnsureEntities(ctx context.Context, entities []*spec.Entity) error
	// EntityRow returns the row with a primary key, values as JSON has them; ErrNotFound.
	EntityRow(ctx context.Context, e *spec.Entity, id string) (map[string]any, error)

	// Insight tells of past and present jobs.
	Insight
	// Alerts keeps how alerts stand.
	Alerts

	// Close releases the database.
	Close() error
}

// MaxLogLines is how many lines of one run are kept.
const MaxLogLines = 100_000

package store

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"
)

// JournalOptions bounds a [Journal]. Zero fields take the defaults that are named.
type JournalOptions struct {
	// MaxBatch is how many records go into one commit at most; 256.
	MaxBatch int
	// MaxBatchBytes ends a batch whose payloads are large; 16 MiB.
	MaxBatchBytes int
	// MaxQueue is how many records wait at most; beyond, Append waits for a place; 4096.
	MaxQueue int
	// MaxLines is how many log lines wait at most; beyond, AppendLogs waits; 16384.
	MaxLines int
	// Tries is how often a batch is tried whose whole transaction fails; 6. While the
	// database is not available it is tried until Close, and Tries times from then on.
	Tries int
	// Backoff is the wait after the first try. It doubles, up to a second; 10 ms.
	Backoff time.Duration
	// Logger may be nil.
	Logger *slog.Logger
	// OnCommit is told of each commit: how many records it held, how long it took with all
	// its tries, and its error. It must be quick. May be nil.
	OnCommit func(records int, took time.Duration, err error)
	// OnLogs is told of each write of log lines. May be nil.
	OnLogs func(lines int, took time.Duration, err error)
}

// Journal gathers the records of all runs into few commits: while one commit is in flight,
// the next batch gathers. The cost of a record falls as load rises.
type Journal struct {
	store Store
	o     JournalOptions
	// places bounds the queue.
	places chan struct{}
	wake   chan struct{} // one token: something waits
	closed chan struct{}
	done   chan struct{}
	// hastened is closed once what waits is to be given up soon.
	hastened chan struct{}
	hasten   sync.Once
	// gaveUp says that a batch was given up since.
	gaveUp bool

	mu sync.Mutex
	// busy is how many entries wait to be tried again, because of somebody's lock.
	busy  int
	queue []*entry
	lines []*LogLine
	// room is closed, and made anew, whenever lines were taken.
	room     chan struct{}
	isClosed bool
}

// entry is a record that waits, or with no record someone who waits for the lines before it.
type entry struct {
	record *Record
	bytes  int
	done   chan error
	// inFlight is set, under the journal's lock, when the entry leaves the queue.
	inFlight bool
	// locked counts the tries that met somebody's lock. The entry has no place of its own then.
	locked int
}

// NewJournal starts a journal on a store. Close ends it; the store stays open.
func NewJournal(st Store, o JournalOptions) *Journal {
	setDefault(&o.MaxBatch, 256)
	setDefault(&o.MaxBatchBytes, 16<<20)
	setDefault(&o.MaxQueue, 4096)
	setDefault(&o.MaxLines, 16384)
	setDefault(&o.Tries, 6)
	setDefault(&o.Backoff, 10*time.Millisecond)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnCommit == nil {
		o.OnCommit = func(int, time.Duration, error) {}
	}
	if o.OnLogs == nil {
		o.OnLogs = func(int, time.Duration, error) {}
	}
	j := &Journal{
		store:  st,
		o:      o,
		places: make(chan struct{}, o.MaxQueue),
		wake:   make(chan struct{}, 1),
		closed: make(chan struct{}),
		done:   make(chan struct{}),
		room:   make(chan struct{}),

		hastened: make(chan struct{}),
	}
	go j.run()
	return j
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Append writes a record and returns when it is durable, or with the error that the store
// gave it. Records of one run become durable in the order in which they were appended.
//
// When ctx ends while the record still waits, the record is withdrawn. Once it is in flight,
// Append waits for its outcome whatever ctx says: the outcome is never unknown.
func (j *Journal) Append(ctx context.Context, r *Record) error {
	return j.wait(ctx, &entry{record: r, bytes: recordBytes(r), done: make(chan error, 1)})
}

// Flush returns when the log lines appended before it can be read from the store.
func (j *Journal) Flush(ctx context.Context) error {
	return j.wait(ctx, &entry{done: make(chan error, 1)})
}

func (j *Journal) wait(ctx context.Context, e *entry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case j.places <- struct{}{}: // nearly always: one case alone is quick
	default:
		select {
		case j.places <- struct{}{}:
		case <-j.closed:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	j.mu.Lock()
	if j.isClosed {
		j.mu.Unlock()
		<-j.places
		return ErrClosed
	}
	j.queue = append(j.queue, e)
	j.mu.Unlock()
	j.signal()

	if ctx.Done() == nil {
		return <-e.done
	}
	select {
	case err := <-e.done:
		return err
	case <-ctx.Done():
	}
	if j.withdraw(e) {
		return ctx.Err()
	}
	return <-e.done
}

// withdraw takes an entry out of the queue, if it is still there.
func (j *Journal) withdraw(e *entry) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if e.inFlight {
		return false
	}
	if i := slices.Index(j.queue, e); i >= 0 {
		j.queue = slices.Delete(j.queue, i, i+1)
	}
	<-j.places
	return true
}

// AppendLogs queues lines and returns; it waits only while the queue is full. Lines are
// written in order, and before every record that is appended after them. Lines that the store
// refuses for good are dropped and said in the log. The caller leaves the slice alone.
func (j *Journal) AppendLogs(ctx context.Context, lines []*LogLine) error {
	for len(lines) > 0 {
		j.mu.Lock()
		if j.isClosed {
			j.mu.Unlock()
			return ErrClosed
		}
		n := min(j.o.MaxLines-len(j.lines), len(lines))
		j.lines = append(j.lines, lines[:n]...)
		room := j.room
		j.mu.Unlock()
		if lines = lines[n:]; n > 0 {
			j.signal()
			continue
		}
		select {
		case <-room:
		case <-j.closed:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Hasten bounds how often what waits is tried, from now on, also while the database is away.
func (j *Journal) Hasten() { j.hasten.Do(func() { close(j.hastened) }) }

// Close refuses what comes from now on, writes what waits, and returns when that is done.
func (j *Journal) Close() error {
	j.mu.Lock()
	if !j.isClosed {
		j.isClosed = true
		close(j.closed)
	}
	j.mu.Unlock()
	<-j.done
	return nil
}

func (j *Journal) signal() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

func (j *Journal) run() {
	defer close(j.done)
	for {
		j.gather()
		lines, batch := j.take()
		if len(lines) == 0 && len(batch) == 0 {
			select {
			case <-j.wake:
				continue
			case <-j.closed:
			}
			// Nothing is added once the journal is closed, but what met a lock comes back.
			if lines, batch = j.take(); len(lines) == 0 && len(batch) == 0 {
				j.mu.Lock()
				busy := j.busy
				j.mu.Unlock()
				if busy == 0 {
					return
				}
				<-j.wake
				continue
			}
		}
		j.writeLines(lines)
		j.commit(batch)
	}
}

// mostGathered is how often a batch lets others go on first.
const mostGathered = 4

// gather lets whoever is about to append go first, for as long as more comes: those whose records the last commit held, for one. It
// waits for nothing.
func (j *Journal) gather() {
	for had, n := -1, 0; n < mostGathered; n++ {
		j.mu.Lock()
		have := len(j.queue)
		j.mu.Unlock()
		if have <= had {
			return
		}
		had = have
		runtime.Gosched()
	}
}

// take empties the lines and takes the next batch from the queue. Both at once: whatever line
// came before a record of the batch is among the lines.
func (j *Journal) take() ([]*LogLine, []*entry) {
	j.mu.Lock()
	defer j.mu.Unlock()
	lines := j.lines
	if len(lines) > 0 {
		j.lines = nil
		close(j.room)
		j.room = make(chan struct{})
	}
	n, bytes := 0, 0
	for n < len(j.queue) && n < j.o.MaxBatch {
		bytes += j.queue[n].bytes
		if n > 0 && bytes > j.o.MaxBatchBytes {
			break
		}
		j.queue[n].inFlight = true
		if j.queue[n].locked == 0 {
			<-j.places
		}
		n++
	}
	batch := slices.Clone(j.queue[:n])
	j.queue = slices.Delete(j.queue, 0, n)
	return lines, batch
}

func (j *Journal) writeLines(lines []*LogLine) {
	if len(lines) == 0 {
		return
	}
	start := time.Now()
	err := j.try("log lines", func(int) error {
		err := j.store.AppendLogs(context.Background(), lines)
		if errors.Is(err, ErrNotFound) { // a run that is gone; the others' lines are kept
			return nil
		}
		return err
	})
	if err != nil {
		j.o.Logger.Error("dropped log lines of runs", slog.Int("lines", len(lines)), slog.Any("error", err))
	}
	j.o.OnLogs(len(lines), time.Since(start), err)
}

func (j *Journal) commit(batch []*entry) {
	records := make([]*Record, 0, len(batch))
	for _, e := range batch {
		if e.record != nil {
			records = append(records, e.record)
		}
	}
	var results []error
	var err error
	if len(records) > 0 {
		start := time.Now()
		err = j.try("records", func(try int) error {
			var err error
			if results, err = j.commitOnce(records, try > 0); err != nil {
				return err
			}
			return nil
		})
		if err == nil && len(results) != len(records) {
			err = errors.New("the store gave no result for each record")
		}
		j.o.OnCommit(len(records), time.Since(start), err)
	}
	i := 0
	for _, e := range batch {
		switch {
		case e.record == nil:
			e.done <- nil
			continue
		case err != nil:
			e.done <- err
		case errors.Is(results[i], ErrBusy) && j.again(e):
		default:
			e.done <- results[i]
		}
		i++
	}
}

// again puts a record that met somebody's lock behind the others, after a pause. It is false
// where there is no more time for that.
func (j *Journal) again(e *entry) bool {
	e.locked++
	if j.ending() && e.locked >= j.o.Tries {
		return false
	}
	pause := min(100*time.Millisecond<<min(e.locked-1, 5), 2*time.Second)
	if j.ending() {
		pause = j.o.Backoff
	}
	j.mu.Lock()
	j.busy++
	j.mu.Unlock()
	if e.locked == 10 {
		j.o.Logger.Warn("another client of the database holds a lock that a run waits for", slog.String("run_id", e.record.RunID))
	}
	time.AfterFunc(pause, func() {
		j.mu.Lock()
		j.busy--
		j.queue = append(j.queue, e)
		j.mu.Unlock()
		j.signal()
	})
	return true
}

// commitOnce commits the records. A connection that breaks during a commit leaves its outcome
// unknown: before they are written again, those are left out that were written after all. A
// run's sequence grows with each of its records, and an epoch has one writer.
func (j *Journal) commitOnce(records []*Record, again bool) ([]error, error) {
	if !again {
		return j.store.Commit(context.Background(), records)
	}
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = r.RunID
	}
	states, err := j.store.RunStates(context.Background(), ids)
	if err != nil {
		return nil, err
	}
	results := make([]error, len(records))
	var rest []*Record
	var places []int
	for i, r := range records {
		if state, ok := states[r.RunID]; ok && state.Epoch == r.Epoch && state.Sequence >= r.Sequence && r.Sequence > 0 {
			continue
		}
		rest, places = append(rest, r), append(places, i)
	}
	if len(rest) == 0 {
		return results, nil
	}
	some, err := j.store.Commit(context.Background(), rest)
	if err != nil {
		return nil, err
	}
	if len(some) != len(rest) {
		return nil, nil // the caller says so
	}
	for i, at := range places {
		results[at] = some[i]
		if d, ok := errors.AsType[*DuplicateError](some[i]); ok && d.RunID == rest[i].RunID {
			results[at] = nil
		}
	}
	return results, nil
}

// try runs fn until it succeeds, a bounded number of times. What fails a whole transaction is
// a busy or broken disk or connection, which may pass.
func (j *Journal) try(what string, fn func(try int) error) error {
	backoff := j.o.Backoff
	for n, bounded := 0, 0; ; n++ {
		err := fn(n)
		if err == nil || errors.Is(err, ErrClosed) {
			return err
		}
		if ending := j.ending(); !errors.Is(err, ErrUnavailable) || ending {
			// At the end the first batch tries for all that follow.
			if bounded++; bounded >= j.o.Tries || ending && j.gaveUp {
				j.gaveUp = ending
				return err
			}
		}
		if n < j.o.Tries || n%30 == 0 {
			j.o.Logger.Warn("the store failed, trying again", slog.String("what", what), slog.Int("try", n+1), slog.Any("error", err))
		}
		<-time.After(backoff)
		backoff = min(2*backoff, time.Second)
	}
}

// ending says whether what waits is to be given up soon.
func (j *Journal) ending() bool {
	select {
	case <-j.closed:
		return true
	case <-j.hastened:
		return true
	default:
		return false
	}
}

// recordBytes is about how large a record is.
func recordBytes(r *Record) int {
	n := 256
	if c := r.Create; c != nil {
		n += len(c.Input) + len(c.EntityRow) + len(c.Output)
	}
	if r.Run != nil {
		n += len(r.Run.Output)
	}
	for _, jobs := range [][]*Job{r.NewJobs, r.ChangedJobs} {
		for _, j := range jobs {
			n += 256 + len(j.Input) + len(j.Output) + len(j.RunnerConfig) + len(j.ResourceUsage) + len(j.SecurityContext)
		}
	}
	for _, st := range r.Steps {
		n += 128 + len(st.Data)
	}
	return n
}

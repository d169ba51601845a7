package dockerrunner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"go.opentelemetry.io/otel/propagation"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// mostAhead bounds created_ahead, and mostAheadOfAll what one runner keeps of all services.
	mostAhead      = 16
	mostAheadOfAll = 64
	// aheadLifetime is how long a container that was created ahead waits for a job.
	aheadLifetime = 5 * time.Minute
	// aheadPause is how long a job may run before its container is replaced, where it has not ended: sooner,
	// making another one would only hold up a short job.
	aheadPause = time.Second
	// labelAhead is on containers that were created ahead, in place of the job's id: service and operation.
	labelAhead = "dev.specql.created-ahead"
	// jobFile tells a container that was created ahead what others have in their environment.
	jobFile = "job.json"
)

// aheadRefused tells what nothing can be created ahead for: what only a job brings goes into the description of a container.
func (c *Config) aheadRefused(add func(path, mend, format string, args ...any)) {
	if c.CreatedAhead < 0 || c.CreatedAhead > mostAhead {
		add("created_ahead", fmt.Sprintf("write 0 to %d", mostAhead), "%d is not a number of containers from 0 to %d", c.CreatedAhead, mostAhead)
	}
	if c.CreatedAhead == 0 {
		return
	}
	if len(c.Volumes) > 0 {
		add("created_ahead", "leave out created_ahead, or volumes", "a volume's path is looked at anew for each job, so that no container with volumes can be created ahead")
	}
	c.argumentsAhead(c.Command, add)
}

// argumentsAhead refuses arguments that are filled from the input.
func (c *Config) argumentsAhead(args []string, add func(path, mend, format string, args ...any)) {
	for i, arg := range args {
		if c.CreatedAhead > 0 && refers(arg) {
			add(fmt.Sprintf("command[%d]", i), "read the input from stdin, or leave out created_ahead", "a container that is created ahead has its arguments before there is an input")
		}
	}
}

// spare is a container that was created for a job to come. It is used once.
type spare struct {
	id string
	room
	born time.Time
	// latest is the last moment that a job in it may end: its labels let others remove it then.
	latest time.Time
}

// shelf holds the spares of one operation, which are all alike.
type shelf struct {
	key string
	// create makes another one, for jobs that take no longer than the timeout.
	create func(ctx context.Context, timeout time.Duration) (*spare, error)
	// timeout is the longest of the jobs so far, asked when there was the last one.
	timeout time.Duration
	asked   time.Time
	most    int
	// due: it is to be filled. A shelf whose container could not be created waits for the next job.
	due    bool
	spares []*spare // oldest first
}

// ahead keeps what was created ahead. No method waits for the engine.
type ahead struct {
	r      *Runner
	ctx    context.Context //nolint:containedctx // of the background work alone, which is nobody's call
	cancel context.CancelFunc

	mu      sync.Mutex
	shelves map[string]*shelf
	count   int // spares on all shelves
	// left could not be removed yet.
	left    []*spare
	filling bool
	closed  bool
	work    sync.WaitGroup
}

func newAhead(r *Runner) *ahead {
	ctx, cancel := context.WithCancel(context.Background())
	return &ahead{r: r, ctx: ctx, cancel: cancel, shelves: map[string]*shelf{}}
}

// take gives a spare of this very description for a job that ends by the deadline; nil for none. What was
// created by another description is dropped.
func (p *ahead) take(place, key string, deadline, now time.Time) *spare {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shelves[place]
	if s == nil {
		return nil
	}
	if s.key != key {
		p.clear(place)
		return nil
	}
	for len(s.spares) > 0 {
		first := s.spares[0]
		s.spares = s.spares[1:]
		p.count--
		if !first.expired(now) && !deadline.After(first.latest) {
			return first
		}
		p.drop(first)
	}
	return nil
}

func (s *spare) expired(now time.Time) bool { return now.Sub(s.born) > aheadLifetime }

// fill has the shelf filled up in the background, as a job of that timeout asks for it.
func (p *ahead) fill(place, key string, most int, timeout time.Duration, create func(context.Context, time.Duration) (*spare, error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	s := p.shelves[place]
	if s == nil || s.key != key {
		p.clear(place)
		s = &shelf{key: key}
		p.shelves[place] = s
	}
	s.create, s.most, s.due = create, most, true
	s.timeout, s.asked = max(s.timeout, timeout), time.Now()
	if !p.filling {
		p.filling = true
		p.work.Go(p.fillAll)
	}
}

// fillAll creates one container after the other until every shelf is full.
func (p *ahead) fillAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { p.filling = false }()
	for {
		place, s := p.next()
		if s == nil {
			return
		}
		create, timeout := s.create, s.timeout
		p.mu.Unlock()
		made, err := create(p.ctx, timeout)
		p.mu.Lock()
		switch {
		case err != nil:
			s.due = false
			if !p.closed {
				p.r.log.Warn("no container could be created ahead; jobs create their own", slogError(err))
			}
		case p.closed || p.shelves[place] != s:
			p.drop(made)
		default:
			s.spares = append(s.spares, made)
			p.count++
		}
	}
}

// next is a shelf that has room; nil for none. p.mu is held.
func (p *ahead) next() (string, *shelf) {
	if p.closed {
		return "", nil
	}
	for place, s := range p.shelves {
		if s.due = s.due && len(s.spares) < s.most; s.due && p.count < mostAheadOfAll {
			return place, s
		}
	}
	return "", nil
}

// forget drops what was created for a place.
func (p *ahead) forget(place string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear(place)
}

// expire drops what nobody has used for long, and once more what could not be removed.
func (p *ahead) expire(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop(p.left...)
	p.left = nil
	for place, s := range p.shelves {
		for len(s.spares) > 0 && s.spares[0].expired(now) {
			p.drop(s.spares[0])
			s.spares = s.spares[1:]
			p.count--
		}
		if len(s.spares) == 0 && now.Sub(s.asked) > aheadLifetime {
			delete(p.shelves, place)
		}
	}
}

// clear empties a shelf; p.mu is held.
func (p *ahead) clear(place string) {
	s := p.shelves[place]
	if s == nil {
		return
	}
	delete(p.shelves, place)
	p.count -= len(s.spares)
	p.drop(s.spares...)
}

// drop removes containers in the background; p.mu is held.
func (p *ahead) drop(spares ...*spare) {
	if len(spares) == 0 {
		return
	}
	p.work.Go(func() {
		away := false
		for _, s := range spares {
			var err error
			if !away {
				err = p.r.removeContainer(context.Background(), s.id)
				// Without an engine the end is not to wait for each: what is left is found by its labels.
				away = err != nil && p.ctx.Err() != nil
			}
			if err = errors.Join(err, s.remove()); err != nil {
				p.r.log.Warn("remove a container that was created ahead", slogError(err))
				p.mu.Lock()
				p.left = append(p.left, s)
				p.mu.Unlock()
			}
		}
	})
}

// close drops everything, and has nothing created from then on. Wait for p.work to know that all is gone.
func (p *ahead) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.cancel()
	for place := range p.shelves {
		p.clear(place)
	}
}

// Draining implements [runner.Drainer].
func (r *Runner) Draining() { r.ahead.close() }

var (
	// errNoSpare says that a job has to create its own container.
	errNoSpare = errors.New("no container was created ahead")
	// errNotThere says that a container went before it was started.
	errNotThere = errors.New("the container is gone")
)

// notThere tells a container that is gone from what else can fail before its start.
func (r *Runner) notThere(ctx context.Context, id string, err error) error {
	if _, looked := r.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{}); cerrdefs.IsNotFound(looked) {
		return fmt.Errorf("%w: %w", errNotThere, err)
	}
	return err
}

// place is where the spares of the operation are kept.
func (a *attempt) place() string { return a.job.Service.Name + "." + a.job.Operation.Name }

// settle has what this job used created anew, and drops what the service does not ask for any more or may not have.
func (a *attempt) settle(err error) {
	if a.replenish != nil {
		a.replenish()
		return
	}
	if f, failed := fault.As(err); !failed || f.Code == fault.PolicyViolation || f.Code == fault.Validation {
		a.r.ahead.forget(a.place())
	}
}

// runAhead runs the job in a container that was created ahead; [errNoSpare] where there is none.
func (a *attempt) runAhead(ctx context.Context, e *engine, img image) (json.RawMessage, error) {
	place := a.place()
	key, err := a.key(e, img)
	if err != nil {
		return nil, err
	}
	deadline, bounded := ctx.Deadline()
	if !bounded { // nobody could tell when what a crashed runner left may be removed
		return nil, errNoSpare
	}
	now := time.Now()
	create := a.another(place, e, img)
	fill := func() { a.r.ahead.fill(place, key, a.cfg.CreatedAhead, deadline.Sub(now), create) }
	again := time.AfterFunc(aheadPause, fill)
	a.replenish = func() {
		if again.Stop() {
			fill()
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s := a.r.ahead.take(place, key, deadline, now)
	if s == nil {
		return nil, errNoSpare
	}
	a.room = s.room
	output, err := a.runContainer(ctx, s.id, e, img, func(context.Context, string, image) error { return nil })
	if errors.Is(err, errNotThere) {
		// Somebody has pruned it: nothing of the job has run.
		a.r.ahead.forget(place)
		a.meter.group = nil
		err = a.remove()
		a.room = room{}
		if err != nil {
			a.r.log.Warn("clean up after a container that is gone", slogError(err))
		}
		return nil, errNoSpare
	}
	return output, err
}

// key is the whole description of the container, the policies' digest and the configuration with it: what differs
// in any of them is not used. Only what each container has of its own is left out.
func (a *attempt) key(e *engine, img image) (string, error) {
	blank := a.blank()
	blank.output.volume = !e.quota
	spec, err := blank.spec(context.Background(), e, img, nil)
	if err != nil {
		return "", err
	}
	raw, err := json.Marshal([]any{spec.Config, spec.HostConfig, a.r.groups(e), a.policies.digest(), a.job.Service.Config, a.job.Operation.Config})
	if err != nil {
		return "", fault.Wrap(err, fault.Internal, "the container's description cannot be packed")
	}
	return string(raw), nil
}

// blank is an attempt of the same operation that knows nothing of this job.
func (a *attempt) blank() *attempt {
	prepared := *a.prepared
	prepared.job, prepared.checks, prepared.policies, prepared.Input = nil, nil, nil, json.RawMessage("{}")
	return &attempt{
		r: a.r, sink: nobody{}, checks: &runner.Checks{}, prepared: &prepared, cfg: a.cfg, op: a.op, limits: a.limits, name: a.name, network: a.network,
	}
}

// another gives what creates one more container of this operation.
func (a *attempt) another(place string, e *engine, img image) func(context.Context, time.Duration) (*spare, error) {
	blank := a.blank()
	return func(ctx context.Context, timeout time.Duration) (_ *spare, err error) {
		b := blank.blank()
		now := time.Now()
		s := &spare{born: now, latest: now.Add(aheadLifetime + timeout)}
		b.labels = b.r.owner.labels("", s.latest)
		b.labels[labelAhead] = clip(place)
		defer func() {
			if err == nil {
				return
			}
			if s.id != "" {
				err = errors.Join(err, b.r.removeContainer(ctx, s.id))
			}
			err = errors.Join(err, b.remove())
		}()
		if err := b.acquire(e, nil); err != nil {
			return nil, err
		}
		spec, err := b.spec(ctx, e, img, nil)
		if err != nil {
			return nil, err
		}
		if s.id, err = b.createContainer(ctx, spec); err != nil {
			return nil, err
		}
		if err := b.verify(ctx, s.id, img); err != nil {
			return nil, err
		}
		s.room = b.room
		return s, nil
	}
}

// described is what a container that is created ahead finds in its [jobFile]; nil for others, which have it in
// their environment.
func (a *attempt) described(ctx context.Context) ([]byte, error) {
	if a.cfg.CreatedAhead == 0 {
		return nil, nil
	}
	told := map[string]string{"job_id": a.job.ID, "run_id": a.job.RunID, "idempotency_key": a.job.IdempotencyKey}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	maps.Copy(told, carrier)
	raw, err := json.Marshal(told)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "%s cannot be packed", jobFile)
	}
	return append(raw, '\n'), nil
}

// nobody takes what is said while a container is created ahead: no job is there to hear it.
type nobody struct{}

func (nobody) Log(string, string)            {}
func (nobody) Usage(*runnerv1.ResourceUsage) {}
func (nobody) Secret(string)                 {}

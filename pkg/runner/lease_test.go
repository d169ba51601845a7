package runner

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/specql/mesh/pkg/fault"
)

// holding is a runner whose jobs run until they are ended.
type holding struct{ JobRunner }

func (holding) Describe(context.Context) (*Description, error) {
	return &Description{Name: "holding", Types: []Type{{Name: "test"}}}, nil
}

func (holding) Execute(ctx context.Context, _ *Job, _ Sink) (*Result, error) {
	<-ctx.Done()
	return &Result{}, nil
}

// held is a handler with a job that runs under a lease of a minute.
func held(t *testing.T) (*Handler, *job, *subscriber, func(epoch int64) (*subscriber, error)) {
	t.Helper()
	h := Register(grpc.NewServer(), holding{}, Options{})
	t.Cleanup(h.Close)
	admit := func(epoch int64) (*job, *subscriber, error) {
		asked := &Job{ID: "j", Epoch: epoch, Attempt: 1, Timeout: time.Hour, Service: Service{Name: "s", ExecutionType: "test"}}
		j, sub, run, err := h.admit(t.Context(), asked, admission{lease: time.Minute, wake: make(chan struct{}, 1)})
		if run != nil {
			go run()
		}
		return j, sub, err
	}
	j, sub, err := admit(1)
	require.NoError(t, err)
	return h, j, sub, func(epoch int64) (*subscriber, error) {
		_, sub, err := admit(epoch)
		return sub, err
	}
}

// age makes a lease older without its timer, as it is in a process that was stopped.
func age(h *Handler, j *job, d time.Duration) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	j.until = j.until.Add(-d)
	return j.until
}

func until(h *Handler, j *job) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return j.until
}

// ended waits for the job's end and gives its error.
func ended(t *testing.T, j *job, sub *subscriber) (message string, handedBack bool) {
	t.Helper()
	for {
		events, end, refused := j.feed.take(sub)
		require.NoError(t, refused)
		if end {
			fin := events[len(events)-1].GetFinished()
			require.Equal(t, string(fault.Unavailable), fin.GetError().GetCode())
			return fin.GetError().GetMessage(), fin.GetHandedBack()
		}
		select {
		case <-sub.wake:
		case <-time.After(time.Minute):
			require.FailNow(t, "the job did not end")
		}
	}
}

func TestTheRenewalOfAnOldEpochDoesNotCount(t *testing.T) {
	t.Parallel()
	h, j, old, attach := held(t)
	young, err := attach(2)
	require.NoError(t, err)
	aged := age(h, j, 30*time.Second)
	h.renew(j, old) // it was read before the old stream ended
	require.Equal(t, aged, until(h, j))
	h.renew(j, young)
	require.True(t, until(h, j).After(aged))
}

func TestARenewalThatComesTooLateEndsTheJobAtOnce(t *testing.T) {
	t.Parallel()
	h, j, sub, _ := held(t)
	age(h, j, time.Minute)
	h.renew(j, sub)
	message, handedBack := ended(t, j, sub)
	require.Contains(t, message, "the lease of 1m0s lapsed")
	require.True(t, handedBack)
}

func TestALapsedJobIsNotAttachedTo(t *testing.T) {
	t.Parallel()
	h, j, sub, attach := held(t)
	age(h, j, time.Minute)
	_, err := attach(2)
	require.ErrorContains(t, err, "was given up and is being ended here")
	message, _ := ended(t, j, sub)
	require.Contains(t, message, "the lease of 1m0s lapsed")
}

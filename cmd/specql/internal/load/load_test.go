package load

import (
	"context"
	"errors"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// takes is a call of a fixed length, in the time of the test.
func takes(d time.Duration) func(context.Context) (Outcome, error) {
	return func(ctx context.Context) (Outcome, error) {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		return Outcome{}, nil
	}
}

func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := Run(t.Context(), t.Context(), Options{Concurrency: 4, Requests: 10, Call: takes(time.Second)}, nil)
		require.NoError(t, err)
		require.Len(t, r.Samples, 10)
		require.Equal(t, 3*time.Second, r.Elapsed)
		for _, s := range r.Samples {
			require.Equal(t, time.Second, s.Latency, "no caller waits")
		}
		require.InDelta(t, 10.0/3, r.Throughput(), 1e-9)
		slots := r.Timeline(3)
		require.Len(t, slots, 3)
		// A call that ends on a border belongs to the slot that begins there, the last ones to the last slot.
		require.Equal(t, []int{0, 4, 6}, []int{slots[0].Ended, slots[1].Ended, slots[2].Ended})
		require.True(t, math.IsNaN(slots[0].P50))
	})
}

// TestOpenLoop: a target that is too slow for the rate is seen as slow, not as less asked.
func TestOpenLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, err := Run(t.Context(), t.Context(), Options{Concurrency: 1, Requests: 5, Rate: 10, Call: takes(time.Second)}, nil)
		require.NoError(t, err)
		require.Len(t, r.Samples, 5)
		for i, s := range r.Samples {
			require.Equal(t, time.Duration(i)*100*time.Millisecond, s.Start)
			require.Equal(t, time.Duration(i+1)*time.Second-s.Start, s.Latency)
		}
		r, err = Run(t.Context(), t.Context(), Options{Concurrency: 1, Duration: 2 * time.Second, Rate: 10, Call: takes(time.Second)}, nil)
		require.NoError(t, err)
		require.Len(t, r.Samples, 2)
		require.Equal(t, 18, r.Unsent, "what was not sent is told")
		r, err = Run(t.Context(), t.Context(), Options{Concurrency: 3, Duration: 2 * time.Second, Rate: 10, Call: takes(10 * time.Millisecond)}, nil)
		require.NoError(t, err)
		require.Len(t, r.Samples, 20)
		require.Zero(t, r.Unsent)
		require.Equal(t, 1910*time.Millisecond, r.Elapsed)
	})
}

func TestFailuresAndFigures(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	p := &Progress{}
	r, err := Run(t.Context(), t.Context(), Options{Concurrency: 3, Requests: 20, Call: func(context.Context) (Outcome, error) {
		switch i := n.Add(1); {
		case i%10 == 0:
			return Outcome{Code: "TIMEOUT", Message: "slow"}, nil
		case i%4 == 0:
			return Outcome{Code: "REMOTE_ERROR", Message: "no"}, nil
		default:
			return Outcome{Usage: &runnerv1.ResourceUsage{CpuSeconds: new(float64(i)), PeakMemoryMb: new(1.0)}}, nil
		}
	}}, p)
	require.NoError(t, err)
	require.Equal(t, []Failure{{"REMOTE_ERROR", 4, "no"}, {"TIMEOUT", 2, "slow"}}, r.Failures)
	require.Equal(t, 6, r.Failed())
	require.Len(t, r.Figures, 2)
	require.Equal(t, "cpuSeconds", r.Figures[0].Name)
	require.Len(t, r.Figure("peakMemoryMb"), 14)
	require.IsNonDecreasing(t, r.Figure("cpuSeconds"))
	require.Nil(t, r.Figure("networkRxMb"))
	ended, failed, _ := p.Now()
	require.Equal(t, []int{20, 6}, []int{ended, failed})
}

func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrong := errors.New("wrong")
		_, err := Run(t.Context(), t.Context(), Options{Concurrency: 8, Duration: time.Hour, Rate: 0.001, Call: func(context.Context) (Outcome, error) { return Outcome{}, wrong }}, nil)
		require.ErrorIs(t, err, wrong, "at once, whoever waits for the next call")

		stop, end := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer end()
		r, err := Run(t.Context(), stop, Options{Concurrency: 2, Requests: 100, Call: takes(time.Second)}, nil)
		require.NoError(t, err)
		require.True(t, r.Interrupted)
		require.Len(t, r.Samples, 4, "those that were begun end")

		ctx, cut := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cut()
		r, err = Run(ctx, ctx, Options{Concurrency: 2, Requests: 100, Call: takes(time.Second)}, nil)
		require.NoError(t, err)
		require.Len(t, r.Samples, 2, "those that were cut off do not count")

		for _, o := range []Options{{}, {Concurrency: 1, Requests: 1}, {Concurrency: 1, Call: takes(0)}, {Requests: 1, Call: takes(0)}} {
			_, err = Run(t.Context(), t.Context(), o, nil)
			require.Error(t, err)
		}
	})
}

func TestPercentile(t *testing.T) {
	t.Parallel()
	require.True(t, math.IsNaN(Percentile(nil, 0.5)))
	values := []float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	for p, want := range map[float64]float64{0: 1, 0.5: 5, 0.9: 9, 0.95: 10, 1: 10} {
		require.InDelta(t, want, Percentile(values, p), 0)
	}
	require.InDelta(t, 5.5, Mean(values), 0)
	require.Nil(t, (&Result{}).Timeline(10))
	require.Zero(t, (&Result{}).Throughput())
}

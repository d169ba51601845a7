package linger_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/linger"
)

// Each value comes once, in order, after its time and not before.
func TestQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		type seen struct {
			value int
			at    time.Duration
		}
		var all []seen
		q := linger.New(10*time.Millisecond, func(v int) { all = append(all, seen{v, time.Since(began)}) })
		for round := range 3 {
			q.Add(time.Now(), 10*round)
			time.Sleep(4 * time.Millisecond)
			q.Add(time.Now(), 10*round+1)
			q.Add(time.Now(), 10*round+2)
			time.Sleep(96 * time.Millisecond)
		}
		synctest.Wait()
		ms := time.Millisecond
		require.Equal(t, []seen{
			{0, 10 * ms}, {1, 14 * ms}, {2, 14 * ms}, {10, 110 * ms}, {11, 114 * ms}, {12, 114 * ms}, {20, 210 * ms}, {21, 214 * ms}, {22, 214 * ms},
		}, all)
	})
}

// What is added bit by bit is looked for a few times, and each value comes a quarter of the time late at most.
func TestManyAreSweptTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const after, n = 100 * time.Millisecond, 1000
		times := map[time.Time]bool{}
		called := 0
		q := linger.New(after, func(added time.Time) {
			called++
			times[time.Now()] = true
			late := time.Since(added) - after
			require.True(t, late >= 0 && late <= after/4, "%s late", late)
		})
		for range n {
			q.Add(time.Now(), time.Now())
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		require.Equal(t, n, called)
		require.LessOrEqual(t, len(times), n/25+1)
	})
}

// What is added while others are called for is not forgotten.
func TestAddWithin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var got []int
		var q *linger.Queue[int]
		q = linger.New(time.Second, func(v int) {
			if got = append(got, v); v < 5 {
				q.Add(time.Now(), v+1)
			}
		})
		q.Add(time.Now(), 1)
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, []int{1, 2, 3, 4, 5}, got)
	})
}

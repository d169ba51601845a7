package quota_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/quota"
)

func called(p *quota.Place) bool {
	synctest.Wait()
	select {
	case <-p.Turn():
		return true
	default:
		return false
	}
}

func TestLine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l quota.Lines
		require.False(t, l.Waits("k"))
		a, b, c, d := l.Join("k"), l.Join("k"), l.Join("k"), l.Join("k")
		require.True(t, l.Waits("k"))
		require.False(t, l.Waits("other"))
		require.Equal(t, []int{0, 1, 2, 3}, []int{a.Ahead(), b.Ahead(), c.Ahead(), d.Ahead()})

		// The first one alone asks, when it was told to.
		a.Refused(10 * time.Second)
		time.Sleep(9 * time.Second)
		require.False(t, called(a))
		time.Sleep(2 * time.Second)
		require.True(t, called(a))
		time.Sleep(time.Hour)
		require.False(t, called(b), "its answer says what follows")

		// It has its slot, and there is room for two more.
		a.Leave(2)
		a.Leave(2) // twice is once
		require.True(t, called(b))
		require.True(t, called(c))
		require.False(t, called(d))
		// The place of one that goes away lets another one ask.
		b.Leave(0)
		require.True(t, called(d))
		require.Equal(t, 0, c.Ahead())
		c.Refused(0)
		d.Refused(0)
		time.Sleep(time.Second)
		require.True(t, called(c))
		require.False(t, called(d))
		d.Leave(0)
		c.Leave(0)
		require.False(t, l.Waits("k"))
	})
}

// TestLongPause: slots are given back, so that the first of a line asks from time to time.
func TestLongPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var l quota.Lines
		p := l.Join("k")
		p.Refused(time.Hour)
		time.Sleep(time.Minute)
		require.True(t, called(p))
		p.Refused(time.Hour)
		p.Refused(time.Second) // the sooner one counts
		time.Sleep(2 * time.Second)
		require.True(t, called(p))
		p.Leave(0)
	})
}

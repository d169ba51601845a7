package engine

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Nothing wakes as long as nobody watches, and who comes is seen to soon, whenever that is.
func TestWhileWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub()
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var looks []time.Time
		var empty func() // what is done at a look that finds nobody
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			h.whileWatched(ctx, func(ids []string) {
				mu.Lock()
				defer mu.Unlock()
				looks = append(looks, time.Now())
				if len(ids) == 0 && empty != nil {
					empty()
				}
			})
		}()
		after := func(d time.Duration) int {
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return len(looks)
		}
		require.Zero(t, after(time.Hour))

		first := h.subscribe("a", false)
		require.Equal(t, 1, after(firstLook))
		n := after(10 * time.Second)
		mu.Lock()
		for i := range looks[1:] {
			require.LessOrEqual(t, looks[i+1].Sub(looks[i]), followInterval)
		}
		mu.Unlock()
		require.Less(t, n, 110)
		second := h.subscribe("b", true)
		h.unsubscribe("a", first)
		require.GreaterOrEqual(t, after(10*time.Second), n+100)

		// One joins when it has just been seen that nobody is left, and leaves again.
		var third *subscription
		none := make(chan struct{})
		mu.Lock()
		empty = func() {
			third, empty = h.subscribe("c", false), nil
			close(none)
		}
		mu.Unlock()
		h.unsubscribe("b", second)
		<-none
		before := after(0)
		require.Equal(t, before+1, after(firstLook))
		h.unsubscribe("c", third)
		n = after(time.Second)
		require.LessOrEqual(t, n, before+2)
		require.Equal(t, n, after(time.Hour))

		cancel()
		<-ended
	})
}

package engine

import (
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

// Whatever is parked, dropped and parked again, each run wakes once, at its time; and what is left of those that sleep no more is bounded.
func TestParkedRunsWakeAtTheirTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // as the engine's
		var p *parkedRuns
		want, woken := map[uuid.UUID]time.Time{}, 0
		p = newParkedRuns(func() {
			mu.Lock()
			defer mu.Unlock()
			for _, text := range p.due() {
				id := uuid.MustParse(text)
				require.Equal(t, want[id], time.Now(), "it wakes at its time")
				delete(want, id)
				woken++
			}
		})
		ids := make([]uuid.UUID, 500)
		for i := range ids {
			ids[i] = uuid.New()
		}
		r := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			mu.Lock()
			for range 100 {
				id := ids[r.IntN(len(ids))]
				p.drop(id)
				delete(want, id)
				switch r.IntN(4) {
				case 0: // it stays away
				case 1:
					p.add(id, forever, 7, "http")
				default:
					sleep := time.Duration(r.Int64N(int64(time.Hour)))
					p.add(id, sleep, 0, "")
					want[id] = time.Now().Add(sleep)
				}
			}
			require.LessOrEqual(t, len(p.wakes), 2*len(ids)+1000)
			mu.Unlock()
			time.Sleep(time.Minute)
			synctest.Wait()
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Empty(t, want)
		require.Greater(t, woken, 1000)
		for id, k := range p.runs {
			require.Equal(t, forever, k.due)
			require.Equal(t, "http", p.retries[id])
		}
		p.add(ids[0], forever-1, 0, "") // one that sleeps longest of all does not wake at once
		mu.Unlock()
		synctest.Wait()
		mu.Lock()
		_, sleeps := p.runs[ids[0]]
		require.True(t, sleeps)
		n := len(p.runs)
		require.Len(t, p.clear(), n)
		require.Empty(t, p.runs)
	})
}

package faults

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

// What chaos runs on.
const (
	chaosOrchestrators = 3
	chaosRunners       = 3
	chaosEvery         = 50 * time.Millisecond // a new run
	chaosInFlight      = 300                   // starts that wait for an answer; beyond that the load pauses
	chaosMemoryMB      = 600                   // of one process, however long the faults last
)

// strike is one fault of a schedule: it begins at a time and is undone some time later.
type strike struct {
	at    time.Duration
	lasts time.Duration
	// kind is what happens to target, a part of the mesh such as o1, http-runner-2, database, or a link: o1-database, o1-http-runner-2, o1-clients.
	kind, target string
}

func (s strike) String() string {
	return fmt.Sprintf("%7.2f s  %-7s %-20s for %5.2f s", s.at.Seconds(), s.kind, s.target, s.lasts.Seconds())
}

// schedule makes the faults of a seed: the same for the same seed, length and size.
func schedule(seed uint64, length time.Duration, size size) []strike {
	random := rand.New(rand.NewPCG(seed, 0x5eed))
	between := func(low, high time.Duration) time.Duration {
		return low + time.Duration(random.Int64N(int64(high-low)))
	}
	pick := func(n int) int { return 1 + random.IntN(n) }
	kinds := []struct {
		weight      int
		kind        string
		target      func() string
		least, most time.Duration
	}{
		{4, "kill", func() string { return fmt.Sprintf("o%d", pick(size.orchestrators)) }, 0, 8 * time.Second},
		{3, "stop", func() string { return fmt.Sprintf("o%d", pick(size.orchestrators)) }, time.Second, 20 * time.Second},
		{4, "kill", func() string { return fmt.Sprintf("http-runner-%d", pick(size.runners)) }, 0, 8 * time.Second},
		{3, "stop", func() string { return fmt.Sprintf("http-runner-%d", pick(size.runners)) }, time.Second, 20 * time.Second},
		{2, "crash", func() string { return "database" }, 0, 3 * time.Second},
	}
	for _, network := range []struct {
		weight      int
		kind        string
		least, most time.Duration
	}{{2, "reset", 0, 1}, {2, "cut", time.Second, 10 * time.Second}, {2, "stall", time.Second, 20 * time.Second}, {1, "slow", 2 * time.Second, 15 * time.Second}} {
		for _, to := range []func() string{
			func() string { return fmt.Sprintf("o%d-database", pick(size.orchestrators)) },
			func() string { return fmt.Sprintf("o%d-http-runner-%d", pick(size.orchestrators), pick(size.runners)) },
			func() string { return fmt.Sprintf("o%d-clients", pick(size.orchestrators)) },
		} {
			kinds = append(kinds, struct {
				weight      int
				kind        string
				target      func() string
				least, most time.Duration
			}{network.weight, network.kind, to, network.least, network.most})
		}
	}
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	var out []strike
	busy := map[string]time.Duration{} // until when a target has its fault
	for at := between(time.Second, 3*time.Second); at < length; at += between(300*time.Millisecond, 3*time.Second) {
		n := random.IntN(total)
		i := 0
		for ; n >= kinds[i].weight; i++ {
			n -= kinds[i].weight
		}
		s := strike{at: at, kind: kinds[i].kind, target: kinds[i].target(), lasts: between(kinds[i].least, kinds[i].most)}
		if busy[s.target] > at {
			continue
		}
		busy[s.target] = at + s.lasts + time.Second
		out = append(out, s)
	}
	return out
}

func TestScheduleOfASeed(t *testing.T) {
	s := size{orchestrators: chaosOrchestrators, runners: chaosRunners}
	first := schedule(7, 10*time.Minute, s)
	require.Equal(t, first, schedule(7, 10*time.Minute, s), "the same seed is the same schedule")
	require.NotEqual(t, first, schedule(8, 10*time.Minute, s))
	seen := map[string]bool{}
	for _, f := range first {
		kind := "network"
		if !strings.HasPrefix(f.target, "o") || !strings.Contains(f.target, "-") {
			kind = strings.TrimRight(f.target, "0123456789")
		}
		seen[f.kind+" "+kind] = true
	}
	for _, want := range []string{
		"kill o", "stop o", "kill http-runner-", "stop http-runner-", "crash database",
		"reset network", "cut network", "stall network", "slow network",
	} {
		require.True(t, seen[want], "%s in %v", want, seen)
	}
}

// chaos carries a schedule out.
type chaos struct {
	m     *mesh
	begin time.Time

	mu   sync.Mutex
	errs []error
	// turns keep two faults of one target apart where undoing the first took long.
	turns map[string]*sync.Mutex
}

func (c *chaos) turn(target string) *sync.Mutex {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turns[target] == nil {
		c.turns[target] = &sync.Mutex{}
	}
	return c.turns[target]
}

func (c *chaos) note(err error) {
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.errs = append(c.errs, err)
	}
}

// sleep waits until a time of the schedule, or for the end.
func (c *chaos) sleep(ctx context.Context, until time.Duration) {
	timer := time.NewTimer(time.Until(c.begin.Add(until)))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// carry carries all strikes out and returns when the last one is undone. Once ctx has ended each is undone at once.
func (c *chaos) carry(ctx context.Context, strikes []strike) {
	var all sync.WaitGroup
	for _, s := range strikes {
		all.Go(func() {
			if c.sleep(ctx, s.at); ctx.Err() != nil {
				return
			}
			turn := c.turn(s.target)
			turn.Lock()
			defer turn.Unlock()
			if ctx.Err() != nil {
				return
			}
			undo := c.strike(s)
			c.sleep(ctx, s.at+s.lasts)
			c.note(undo())
		})
	}
	all.Wait()
}

// strike does what a strike says and gives what undoes it. Other contexts than the test's would leave the mesh in pieces.
func (c *chaos) strike(s strike) (undo func() error) {
	ctx := c.m.t.Context()
	if s.target == "database" {
		c.note(c.m.cluster.Stop(pgtest.Immediate))
		return c.m.cluster.Start
	}
	for _, o := range c.m.orchestrators {
		if s.target == o.name {
			return c.strikeNode(s.kind, &o.node, func() error { return o.start(ctx) })
		}
		if s.target == o.name+"-database" {
			return strikeLink(s.kind, o.db)
		}
		if s.target == o.name+"-clients" {
			return strikeLink(s.kind, o.api)
		}
		for n, r := range c.m.runners {
			if s.target == o.name+"-"+r.name {
				return strikeLink(s.kind, o.runners[n])
			}
		}
	}
	for _, r := range c.m.runners {
		if s.target == r.name {
			return c.strikeNode(s.kind, &r.node, func() error { return r.start(ctx) })
		}
	}
	c.note(fmt.Errorf("%s is no part of the mesh", s.target))
	return func() error { return nil }
}

func (c *chaos) strikeNode(kind string, n *node, start func() error) (undo func() error) {
	p := n.process()
	if !p.alive() {
		c.note(fmt.Errorf("%s ended by itself: %s", n.name, p.cmd.ProcessState))
		return start
	}
	if kind == "kill" {
		n.kill()
		return start
	}
	p.stop()
	return func() error {
		p.cont()
		return nil
	}
}

func strikeLink(kind string, l *link) (undo func() error) {
	switch kind {
	case "reset":
		l.reset()
	case "cut":
		l.sever()
	case "stall":
		l.stall()
	case "slow":
		l.slow(100 * time.Millisecond)
	}
	return func() error {
		l.heal()
		return nil
	}
}

// TestChaos strikes at random for as long as -chaos says, under a steady load, then mends everything and checks that nothing was lost.
// The same -seed is the same schedule of faults.
func TestChaos(t *testing.T) {
	length, seed := *chaosFor, *chaosSeed
	s := size{orchestrators: chaosOrchestrators, runners: chaosRunners}
	strikes := schedule(seed, length, s)
	t.Logf("seed %d, %s: %d faults; again with: make chaos DURATION=%s SEED=%d", seed, length, len(strikes), length, seed)
	m := startMesh(t, s)
	delays := rand.New(rand.NewPCG(seed, 0xde1a4))
	m.recorder.slowly(func(int) time.Duration { // one at a time, under the recorder's lock
		if delays.IntN(50) == 0 {
			return time.Duration(delays.IntN(3000)) * time.Millisecond
		}
		return time.Duration(delays.IntN(100)) * time.Millisecond
	})
	c := &chaos{m: m, begin: time.Now(), turns: map[string]*sync.Mutex{}}
	shapes := []*shape{chain(5), fan(), pause(time.Second), chain(2)}
	l := newLoad(m)
	running, stop := context.WithTimeout(t.Context(), length)
	defer stop()
	var all sync.WaitGroup
	all.Go(func() { c.carry(running, strikes) })
	places := make(chan struct{}, chaosInFlight)
	tick := time.NewTicker(chaosEvery)
	defer tick.Stop()
	for n := 0; running.Err() == nil; n++ {
		select {
		case <-tick.C:
		case <-running.Done():
			continue
		}
		select {
		case places <- struct{}{}:
		case <-running.Done():
			continue
		}
		all.Go(func() {
			defer func() { <-places }()
			// A start that is under way at the end is followed up: what was asked for has an answer.
			asking, cancel := context.WithTimeout(t.Context(), length+patience)
			defer cancel()
			if n%5 == 0 {
				c.note(l.insert(asking, n))
				return
			}
			c.note(l.begin(asking, n, fmt.Sprintf("chaos-%d", n), shapes[n%len(shapes)]))
		})
	}
	all.Wait()
	mended := time.Now()
	ended := m.untilEnded(t.Context(), 2*patience)
	sum, bad, _ := m.verdict(t.Context(), l)
	if ended != nil {
		bad = append(bad, ended.Error())
	}
	for _, err := range c.errs {
		bad = append(bad, err.Error())
	}
	// What died is not kept for ever, nor is what was taken up.
	var queued, known int
	require.Eventually(t, func() bool {
		err := m.db.QueryRow(t.Context(), "SELECT (SELECT count(*) FROM jobs.tb_job_queue), (SELECT count(*) FROM jobs.tb_orchestrator WHERE buried_at IS NULL)").Scan(&queued, &known)
		return err == nil && queued == 0 && known == s.orchestrators
	}, patience, 50*time.Millisecond, "seed %d: the database knows the orchestrators that live, and no call that was taken up", seed)
	for _, n := range m.nodes() {
		if p := n.process(); !p.alive() {
			bad = append(bad, fmt.Sprintf("%s ended by itself: %s", n.name, p.cmd.ProcessState))
		}
		if peak := n.note(n.process()); peak > chaosMemoryMB {
			bad = append(bad, fmt.Sprintf("%s held %.0f MB", n.name, peak))
		}
	}
	if len(bad) > 0 {
		var b strings.Builder
		for _, f := range strikes {
			fmt.Fprintln(&b, f)
		}
		t.Logf("seed %d failed; its faults were\n%s", seed, &b)
	}
	m.requireGood(bad)
	heaviest := slices.MaxFunc(m.nodes(), func(a, b *node) int { return cmp.Compare(a.peakMB, b.peakMB) })
	t.Logf("seed %d: %d faults, %s, %d starts refused and repeated; all had ended %.1f s after the last fault; peak memory %.0f MB (%s)",
		seed, len(strikes), sum, l.refused, time.Since(mended).Seconds(), heaviest.peakMB, heaviest.name)
}

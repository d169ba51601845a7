package faults

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// shape is a workflow that the tests run: each step is one call, which is given the key of the step before it.
type shape struct {
	name string
	yaml string
	// before names the step before each step; empty for the first ones.
	before map[string]string
	// last is the step whose key is the output.
	last string
}

// evidence is what the checker judges by.
type evidence struct {
	// asked are the shapes of the runs that were asked for, by idempotency key, and acknowledged those of them that were answered.
	asked        map[string]*shape
	acknowledged map[string]string
	rows         []row
	effects      []effect
	changes      []change
	// inserted are the calls that were asked for by SQL, true for those whose commit was acknowledged.
	inserted map[string]bool
	loose    []loose
}

// loosePrefix begins the name of each call that is inserted by SQL, where its run's id is in other calls.
const loosePrefix = "sql-"

// summary counts what is no violation, but good to know.
type summary struct {
	runs, loose, effects, repeats, takeovers int
}

func (s summary) String() string {
	return fmt.Sprintf("%d runs and %d calls by SQL, %d requests of which %d were repeats, %d changes of owner", s.runs, s.loose, s.effects, s.repeats, s.takeovers)
}

// check gives every violation of what was promised: every run that was acknowledged completed, each of its steps had its effect
// with the result of the step before, repeats carry the same key, other steps another one, and no run had two owners.
func check(e evidence) (summary, []string) {
	var bad []string
	violation := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	sum := summary{runs: len(e.rows), loose: len(e.loose), effects: len(e.effects)}

	byStep := map[[2]string][]effect{}
	stepOf := map[string][2]string{}
	for _, f := range e.effects {
		id := [2]string{f.Run, f.Step}
		byStep[id] = append(byStep[id], f)
		if f.Key == "" {
			violation("run %s, step %s: a request without a key", f.Run, f.Step)
			continue
		}
		if other, ok := stepOf[f.Key]; ok && other != id {
			violation("key %s: of run %s, step %s as well as of run %s, step %s", f.Key, other[0], other[1], f.Run, f.Step)
		}
		stepOf[f.Key] = id
	}
	known := map[string]bool{}
	for _, r := range e.rows {
		known[r.ID] = true
		s := e.asked[r.Key]
		if s == nil {
			violation("run %s with key %q: nobody asked for it", r.ID, r.Key)
			continue
		}
		if r.Status != "completed" {
			violation("run %s is %s, of %q: %s", r.ID, r.Status, r.Owner, r.Error)
		}
		if r.Open > 0 && r.Status == "completed" {
			violation("run %s is completed and %d of its jobs are not", r.ID, r.Open)
		}
		for step, before := range s.before {
			fs := byStep[[2]string{r.ID, step}]
			if r.Jobs[step] > 1 {
				violation("run %s, step %s: %d jobs", r.ID, step, r.Jobs[step])
			}
			if len(fs) == 0 {
				if r.Status == "completed" {
					violation("run %s, step %s: it never arrived", r.ID, step)
				}
				continue
			}
			sum.repeats += len(fs) - 1
			answered := false
			for _, f := range fs {
				if f.Key != fs[0].Key {
					violation("run %s, step %s: keys %s and %s", r.ID, step, fs[0].Key, f.Key)
				}
				answered = answered || !f.Ended.IsZero()
				if before == "" {
					continue
				}
				if bs := byStep[[2]string{r.ID, before}]; len(bs) == 0 || bs[0].Key != f.Before {
					violation("run %s, step %s: given %q and not the key of step %s", r.ID, step, f.Before, before)
				} else if !slices.ContainsFunc(bs, func(b effect) bool { return !b.Ended.IsZero() && b.Ended.Before(f.Began.Add(time.Second)) }) {
					violation("run %s, step %s: begun before step %s was answered", r.ID, step, before)
				}
			}
			if !answered && r.Status == "completed" {
				violation("run %s, step %s: completed without an answer", r.ID, step)
			}
		}
		if fs := byStep[[2]string{r.ID, s.last}]; r.Status == "completed" && (len(fs) == 0 || r.Token != fs[0].Key) {
			violation("run %s: its output is %q and not the key of step %s", r.ID, r.Token, s.last)
		}
		if len(r.Jobs) != len(s.before) && r.Status == "completed" {
			violation("run %s: jobs of %d steps instead of %d", r.ID, len(r.Jobs), len(s.before))
		}
	}
	for key, id := range e.acknowledged {
		if !known[id] {
			violation("run %s with key %s was acknowledged and is not there", id, key)
		}
	}
	sum.repeats += checkLoose(e, byStep, violation)
	for id := range byStep {
		if !known[id[0]] && !strings.HasPrefix(id[0], loosePrefix) {
			violation("run %s, step %s: a request of a run that is not there", id[0], id[1])
		}
	}
	sum.takeovers = checkOwners(e.changes, violation)
	return sum, bad
}

// checkLoose looks at the calls that were inserted by SQL: each that was committed is one row that has completed, and arrived.
func checkLoose(e evidence, byStep map[[2]string][]effect, violation func(string, ...any)) (repeats int) {
	rows := map[string]int{}
	for _, l := range e.loose {
		rows[l.Name]++
		fs := byStep[[2]string{l.Name, "1"}]
		repeats += max(0, len(fs)-1)
		switch {
		case l.Status != "completed":
			violation("call %s is %s after %d attempts: %s", l.Name, l.Status, l.Attempts, l.Error)
		case !slices.ContainsFunc(fs, func(f effect) bool { return !f.Ended.IsZero() }):
			violation("call %s: completed without an answer", l.Name)
		}
		for _, f := range fs {
			if f.Key != fs[0].Key {
				violation("call %s: keys %s and %s", l.Name, fs[0].Key, f.Key)
			}
		}
	}
	for name, committed := range e.inserted {
		if n := rows[name]; n > 1 || n == 0 && committed {
			violation("call %s has %d rows", name, n)
		}
	}
	for id := range byStep {
		if strings.HasPrefix(id[0], loosePrefix) && rows[id[0]] == 0 {
			violation("call %s: a request of a row that was not committed", id[0])
		}
	}
	return repeats
}

// final says whether nothing follows a state.
func final(status string) bool {
	return status == "completed" || status == "failed" || status == "cancelled"
}

// checkOwners goes through the changes of each run: epochs never fall, an epoch has one owner, an owner is one process, and what an
// epoch's walk wrote was written by the owner of that epoch.
func checkOwners(all []change, violation func(string, ...any)) (takeovers int) {
	writers := map[string]string{} // the process of an owner
	type tenure struct {
		run   string
		epoch int64
	}
	owners := map[tenure]string{}
	last := map[string]change{}
	for _, c := range all {
		before, seen := last[c.Run]
		last[c.Run] = c
		if c.Owner != "" {
			id := tenure{c.Run, c.Epoch}
			if o, ok := owners[id]; ok && o != c.Owner {
				violation("run %s, epoch %d: owners %s and %s (change %d)", c.Run, c.Epoch, o, c.Owner, c.N)
			}
			owners[id] = c.Owner
			if w, ok := writers[c.Owner]; !ok {
				writers[c.Owner] = c.Writer // whoever takes a run writes it
			} else if (!seen || before.Owner != c.Owner) && w != c.Writer {
				violation("owner %s: processes %s and %s (change %d)", c.Owner, w, c.Writer, c.N)
			}
		}
		if !seen {
			continue
		}
		if c.Epoch < before.Epoch {
			violation("run %s: epoch %d after %d (change %d by %s)", c.Run, c.Epoch, before.Epoch, c.N, c.Writer)
		}
		if c.Epoch == before.Epoch && c.Owner != before.Owner && c.Owner != "" && before.Owner != "" {
			violation("run %s: from owner %s to %s in epoch %d (change %d)", c.Run, before.Owner, c.Owner, c.Epoch, c.N)
		}
		if c.Owner != before.Owner && c.Owner != "" && before.Owner != "" {
			takeovers++
		}
		if c.Sequence < before.Sequence {
			violation("run %s: sequence %d after %d (change %d by %s)", c.Run, c.Sequence, before.Sequence, c.N, c.Writer)
		}
		if final(before.Status) && c.Status != before.Status {
			violation("run %s: %s after %s (change %d by %s)", c.Run, c.Status, before.Status, c.N, c.Writer)
		}
		// A request or a heartbeat is noted by anybody; the walk is the owner's.
		if c.Sequence != before.Sequence || c.Status != before.Status {
			if w := writers[c.Owner]; c.Owner == "" || w != c.Writer {
				violation("run %s, epoch %d: %s wrote what %s (%s) owns (change %d)", c.Run, c.Epoch, c.Writer, c.Owner, w, c.N)
			}
		}
	}
	return takeovers
}

// takeover is how long runs of an owner that was killed waited for another.
type takeover struct {
	runs    int
	longest time.Duration
	// first is how long it took until the first run had another owner.
	first time.Duration
}

// takeovers looks at the runs that a process owned at a time and that had not ended: when each got an owner in another process. A run
// that got none is a violation, as is one that waited longer than limit.
func takeovers(all []change, writer string, at time.Time, limit time.Duration) (takeover, []string) {
	var bad []string
	out := takeover{first: -1}
	owned := map[string]change{}
	processes := map[string]string{}
	var waits []time.Duration
	for _, c := range all {
		if _, ok := processes[c.Owner]; !ok && c.Owner != "" {
			processes[c.Owner] = c.Writer
		}
		if c.At.Before(at) {
			if processes[c.Owner] == writer && !final(c.Status) {
				owned[c.Run] = c
			} else {
				delete(owned, c.Run)
			}
			continue
		}
		was, ok := owned[c.Run]
		if !ok {
			continue
		}
		switch {
		case c.Owner == was.Owner && c.Epoch == was.Epoch:
			// What was on its way when the process ended, or a request.
			if final(c.Status) {
				delete(owned, c.Run)
			}
		case c.Owner != "" && c.Epoch > was.Epoch:
			waits = append(waits, c.At.Sub(at))
			delete(owned, c.Run)
		}
	}
	for run, c := range owned {
		bad = append(bad, fmt.Sprintf("run %s of %s (%s, epoch %d) was taken over by nobody", run, writer, c.Owner, c.Epoch))
	}
	slices.Sort(bad)
	slices.Sort(waits)
	if out.runs = len(waits); out.runs > 0 {
		out.first, out.longest = waits[0], waits[len(waits)-1]
	}
	if out.longest > limit {
		bad = append(bad, fmt.Sprintf("runs of %s waited up to %s for another owner", writer, out.longest))
	}
	return out, bad
}

// The checker finds each kind of violation in evidence that is otherwise good.
func TestChecker(t *testing.T) {
	t0 := time.Now()
	at := func(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }
	two := &shape{before: map[string]string{"1": "", "2": "1"}, last: "2"}
	good := func() evidence {
		return evidence{
			asked:        map[string]*shape{"a": two},
			acknowledged: map[string]string{"a": "r"},
			inserted:     map[string]bool{"sql-1": true, "sql-2": false}, // the commit of the second failed
			loose:        []loose{{Name: "sql-1", Status: "completed"}},
			rows:         []row{{ID: "r", Key: "a", Status: "completed", Token: "k2", Jobs: map[string]int{"1": 1, "2": 1}}},
			effects: []effect{
				{Run: "r", Step: "1", Key: "k1", Began: at(1)}, // under way when its runner was killed
				{Run: "r", Step: "1", Key: "k1", Began: at(5), Ended: at(6)},
				{Run: "r", Step: "2", Key: "k2", Before: "k1", Began: at(7), Ended: at(8)},
				{Run: "sql-1", Step: "1", Key: "ks", Began: at(7), Ended: at(8)},
			},
			changes: []change{
				{N: 1, At: at(0), Writer: "o1", Run: "r", Owner: "A", Epoch: 1, Status: "running", Sequence: 1},
				{N: 2, At: at(4), Writer: "o2", Run: "r", Owner: "B", Epoch: 2, Status: "running", Sequence: 1},
				{N: 3, At: at(6.5), Writer: "o2", Run: "r", Owner: "B", Epoch: 2, Status: "running", Sequence: 3},
				{N: 4, At: at(7), Writer: "o1", Run: "r", Owner: "B", Epoch: 2, Status: "running", Sequence: 3}, // a cancel is asked for elsewhere
				{N: 5, At: at(9), Writer: "o2", Run: "r", Owner: "B", Epoch: 2, Status: "completed", Sequence: 5},
			},
		}
	}
	sum, bad := check(good())
	require.Empty(t, bad)
	require.Equal(t, summary{runs: 1, loose: 1, effects: 4, repeats: 1, takeovers: 1}, sum)
	for _, c := range []struct {
		name string
		harm func(*evidence)
		says string
	}{
		{"lost run", func(e *evidence) { e.rows = nil }, "acknowledged and is not there"},
		{"doubled run", func(e *evidence) { e.rows = append(e.rows, row{ID: "q", Key: "b", Status: "completed"}) }, "nobody asked for it"},
		{"not completed", func(e *evidence) { e.rows[0].Status = "running" }, "is running"},
		{"open job", func(e *evidence) { e.rows[0].Open = 1 }, "of its jobs are not"},
		{"two jobs of one step", func(e *evidence) { e.rows[0].Jobs["1"] = 2 }, "2 jobs"},
		{"wrong output", func(e *evidence) { e.rows[0].Token = "k1" }, "its output"},
		{"lost effect", func(e *evidence) { e.effects = append(e.effects[:2], e.effects[3]) }, "never arrived"},
		{"another key", func(e *evidence) { e.effects[0].Key = "k0" }, "keys k0 and k1"},
		{"no key", func(e *evidence) { e.effects[0].Key = "" }, "without a key"},
		{"one key for two steps", func(e *evidence) { e.effects[2].Key = "k1" }, "as well as"},
		{"result of another step", func(e *evidence) { e.effects[2].Before = "k9" }, "not the key of step 1"},
		{"begun too early", func(e *evidence) { e.effects[2].Began = at(2) }, "begun before step 1 was answered"},
		{"no answer", func(e *evidence) { e.effects[2].Ended = time.Time{} }, "without an answer"},
		{"stray request", func(e *evidence) { e.effects = append(e.effects, effect{Run: "x", Step: "1", Key: "kx"}) }, "run that is not there"},
		{"epoch falls", func(e *evidence) { e.changes[2].Epoch = 1 }, "epoch 1 after 2"},
		{"two owners of an epoch", func(e *evidence) { e.changes[1].Epoch = 1 }, "owners A and B"},
		{"stale write", func(e *evidence) { e.changes[3].Sequence = 4 }, "o1 wrote what B (o2) owns"},
		{"stale owner comes back", func(e *evidence) { e.changes[3].Owner = "A"; e.changes[3].Epoch = 2 }, "owners B and A"},
		{"sequence falls", func(e *evidence) { e.changes[4].Sequence = 2 }, "sequence 2 after 3"},
		{"completed goes back", func(e *evidence) { e.changes[2].Status = "failed" }, "running after failed"},
		{"lost row", func(e *evidence) { e.loose = nil }, "call sql-1 has 0 rows"},
		{"row that failed", func(e *evidence) { e.loose[0].Status = "failed" }, "call sql-1 is failed"},
		{"row without an effect", func(e *evidence) { e.effects = e.effects[:3] }, "call sql-1: completed without"},
		{"row with two keys", func(e *evidence) { e.effects = append(e.effects, effect{Run: "sql-1", Step: "1", Key: "ks2"}) }, "keys ks and ks2"},
		{"call of a row that is not there", func(e *evidence) { e.effects = append(e.effects, effect{Run: "sql-2", Step: "1", Key: "ks2"}) }, "not committed"},
		{"owner in two processes", func(e *evidence) {
			e.changes = append(e.changes, change{N: 6, Writer: "o3", Run: "q", Owner: "B", Epoch: 1, Status: "running"})
		}, "processes o2 and o3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := good()
			c.harm(&e)
			_, bad := check(e)
			require.NotEmpty(t, bad)
			require.Contains(t, fmt.Sprint(bad), c.says)
		})
	}

	took, bad := takeovers(good().changes, "o1", at(1), 10*time.Second)
	require.Empty(t, bad)
	require.Equal(t, takeover{runs: 1, first: 3 * time.Second, longest: 3 * time.Second}, took)
	_, bad = takeovers(good().changes, "o1", at(1), 2*time.Second)
	require.Len(t, bad, 1, "it took three seconds")
	_, bad = takeovers(good().changes[:1], "o1", at(1), 10*time.Second)
	require.Len(t, bad, 1, "nobody took the run over")
	took, bad = takeovers(good().changes, "o2", at(10), 10*time.Second)
	require.Empty(t, bad)
	require.Zero(t, took.runs, "it had ended")
}

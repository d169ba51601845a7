// Package faults proves that faults are ordinary: it runs the real programs as processes over one PostgreSQL, kills, stops
// and cuts them off, and checks from outside, by what a recording server received and what the database went through,
// that nothing was lost and that no run had two owners.
package faults

import (
	"flag"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Flags of TestChaos and TestRateHoldsOverReplicas; `make chaos` and `make rate` set them.
var (
	chaosFor  = flag.Duration("chaos", 8*time.Second, "how long TestChaos goes on")
	rateFor   = flag.Duration("rate", 75*time.Second, "how long TestRateHoldsOverReplicas goes on")
	chaosSeed = flag.Uint64("seed", 1, "the seed of the faults; 0 takes one from the clock")
)

// suite ends what all tests share, after the last and before goroutines are counted.
type suite struct{ *testing.M }

func (s suite) Run() int {
	defer nursery.close()
	return s.M.Run()
}

func TestMain(m *testing.M) {
	flag.Parse()
	if *chaosSeed == 0 {
		*chaosSeed = uint64(time.Now().UnixNano())
	}
	goleak.VerifyTestMain(suite{m})
}

package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const (
	// limitsFor is how long a runner's answer is taken for true: its operator's policy and the functions that it
	// calls may change.
	limitsFor = time.Minute
	// staleLimitsFor is for how much longer, where the runner does not answer any more.
	staleLimitsFor = time.Hour
	// limitsWait is how long a runner may take to answer, and limitsPause how long one that did not is left alone.
	limitsWait, limitsPause = 8 * time.Second, time.Second
	// leastLimitsWait is for who has waited for the answer to another, which then did not come.
	leastLimitsWait = 100 * time.Millisecond
	// mostLimits bounds the answers that are kept, and the limits of one.
	mostLimits      = 4096
	mostLimitsOfOne = 16
	// mostRule bounds the words for a limit, in bytes.
	mostRule = 500
	// longestWindow of a limit.
	longestWindow = 31 * 24 * time.Hour
)

// limitCache keeps what one runner said of operations.
type limitCache struct {
	mu    sync.Mutex
	known map[limitKey]*knownLimits
}

// limitKey is an operation as its runner sees it; sum stands for what is configured.
type limitKey struct {
	service, operation string
	sum                uint64
}

var limitSeed = maphash.MakeSeed()

type knownLimits struct {
	asking   chan struct{} // holds one: one asks, the others wait
	limits   []engine.Limit
	at       time.Time // of the answer; zero for none
	askAgain time.Time
	err      error
}

func keyOfLimits(n *plan.Call) limitKey {
	var h maphash.Hash
	h.SetSeed(limitSeed)
	for _, part := range [][]byte{n.RunnerConfig, n.SecurityPolicy, n.OperationConfig} {
		_, _ = h.Write(part)
		_ = h.WriteByte(0)
	}
	return limitKey{n.Service.Name, n.Operation.Name, h.Sum64()}
}

func (c *limitCache) of(k limitKey) *knownLimits {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.known[k]; e != nil {
		return e
	}
	if c.known == nil || len(c.known) >= mostLimits {
		c.known = map[limitKey]*knownLimits{}
	}
	e := &knownLimits{asking: make(chan struct{}, 1)}
	c.known[k] = e
	return e
}

// Limits implements engine.Dispatcher: what the runner says, for a minute.
func (d *Dispatcher) Limits(ctx context.Context, n *plan.Call, changed bool) ([]engine.Limit, error) {
	t := d.runners[n.Service.ExecutionType]
	if t == nil {
		return nil, nil // the call fails, and says why
	}
	e := t.limits.of(keyOfLimits(n))
	arrived := time.Now()
	select {
	case e.asking <- struct{}{}:
		defer func() { <-e.asking }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	now := time.Now()
	known := !e.at.IsZero()
	switch {
	case known && now.Sub(e.at) < limitsFor && !changed:
		return e.limits, nil
	case now.Before(e.askAgain) && known && now.Sub(e.at) < limitsFor+staleLimitsFor:
		return e.limits, nil
	case now.Before(e.askAgain) && !known:
		return nil, e.err
	}
	wait := limitsWait
	if !known {
		// One that is just being started is waited for, by each for as long as it would wait for it to begin the job.
		wait = min(startWait, cmp.Or(max(0, n.Timeout), engine.DefaultTimeout)) - now.Sub(arrived)
		if wait <= 0 && e.err != nil {
			return nil, e.err
		}
		wait = max(wait, leastLimitsWait)
	}
	actx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	resp, err := t.client.Limits(actx, &runnerv1.LimitsRequest{
		Service: &runnerv1.Service{
			Name: n.Service.Name, ExecutionType: n.Service.ExecutionType, RunnerConfig: n.RunnerConfig, SecurityPolicy: n.SecurityPolicy,
		},
		Operation: &runnerv1.Operation{Name: n.Operation.Name, Config: n.OperationConfig},
	}, grpc.WaitForReady(!known))
	now = time.Now()
	switch {
	case status.Code(err) == codes.Unimplemented:
		e.limits, e.at, e.err = nil, now, nil
		return nil, nil
	case err == nil:
		var limits []engine.Limit
		if limits, err = readLimits(t.executionType, resp); err == nil {
			e.limits, e.at, e.err = limits, now, nil
			return limits, nil
		}
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	if known || actx.Err() == nil {
		e.askAgain = now.Add(limitsPause)
	}
	f := fault.FromError(err)
	e.err = fault.New(fault.Unavailable, "the %s runner at %s does not tell the limits of %s.%s: %s", t.executionType, t.address, n.Service.Name, n.Operation.Name, f.Message)
	if known && now.Sub(e.at) < limitsFor+staleLimitsFor && !changed {
		return e.limits, nil
	}
	return nil, e.err
}

// readLimits checks what a runner, which may be anybody's, said.
func readLimits(executionType string, resp *runnerv1.LimitsResponse) ([]engine.Limit, error) {
	if n := len(resp.GetLimits()); n > mostLimitsOfOne {
		return nil, fmt.Errorf("it has %d limits; at most %d are counted", n, mostLimitsOfOne)
	}
	var out []engine.Limit
	seen := map[string]bool{}
	for _, l := range resp.GetLimits() {
		window := l.GetWindow().AsDuration()
		key := executionType + ":" + l.GetKey()
		switch {
		case l.GetKey() == "" || len(key) > store.MaxLimitKey || seen[key]:
			return nil, errors.New("a limit has a key of its own, of at most 500 bytes")
		case window <= 0 || window > longestWindow:
			return nil, fmt.Errorf("limit %s: the window is above zero and at most %s", l.GetKey(), longestWindow)
		}
		for _, usd := range []float64{l.GetMaxCostUsd(), l.GetCostUsd()} {
			if !(usd < store.MaxCost) {
				return nil, fmt.Errorf("limit %s: costs are US dollars below %g", l.GetKey(), float64(store.MaxCost))
			}
		}
		seen[key] = true
		rule := l.GetRule()
		if rule == "" || len(rule) > mostRule {
			rule = l.GetKey()
		}
		out = append(out, engine.Limit{
			Limit: store.Limit{
				Key: key, Window: window, MaxAttempts: max(0, l.GetMaxAttempts()), MaxCost: max(0, l.GetMaxCostUsd()), Cost: max(0, l.GetCostUsd()),
			},
			Budget: l.GetBudget(), Rule: rule, AttemptsKey: clipped(l.GetAttemptsPolicyKey()), CostKey: clipped(l.GetCostPolicyKey()), Ceiling: l.GetCeiling(),
		})
	}
	return out, nil
}

// clipped is the key of a policy; none where a runner gives one that is too long to be one.
func clipped(key string) string {
	if len(key) > mostRule {
		return ""
	}
	return key
}

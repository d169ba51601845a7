package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/orchestrator/server"
)

// starting is a runner that cannot say what it is before it has been asked so often.
type starting struct {
	runner.JobRunner
	asked, before *atomic.Int64
}

func (s starting) Describe(context.Context) (*runner.Description, error) {
	if s.asked.Add(1) <= s.before.Load() {
		return nil, errors.New("not yet")
	}
	return &runner.Description{Name: "starting-runner", Types: []runner.Type{{Name: "starting"}}}, nil
}

// TestRunnersAreWaitedFor: with --wait, as helm test says it, a runner that is not reachable makes for a status of 1.
func TestRunnersAreWaitedFor(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	listen := func() net.Listener {
		lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		return lis
	}
	s := starting{asked: &atomic.Int64{}, before: &atomic.Int64{}}
	s.before.Store(1 << 40)
	lis, api := listen(), listen()
	serveUntilTheEnd(t, func(ctx context.Context) error { return runner.Serve(ctx, lis, s, nil, runner.Options{}) })
	serveUntilTheEnd(t, func(ctx context.Context) error {
		return server.Run(ctx, server.Options{
			Listener: api, Runners: map[string]string{"starting": lis.Addr().String()},
			Database: "sqlite:" + filepath.Join(dir, "db"), DrainTimeout: time.Second, Logger: slog.New(slog.DiscardHandler),
		})
	})
	runners := func(args ...string) result {
		return specql(t, dir, append([]string{"runners", "--address", api.Addr().String()}, args...)...)
	}
	r := runners()
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "not reachable")
	r = runners("--wait", "1ms")
	require.Equal(t, 1, r.status, r.err)
	require.Contains(t, r.out, "not reachable")
	s.before.Store(s.asked.Load() + 1) // it fails once more
	r = runners("--wait", "1m")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "starting-runner")
}

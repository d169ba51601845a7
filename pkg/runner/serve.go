package runner

import (
	"cmp"
	"context"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner/wire"
	"github.com/specql/mesh/pkg/telemetry"
)

// flushTimeout is how long the last answers may take to reach their callers.
const flushTimeout = 5 * time.Second

// Serve answers the orchestrator on the listener until ctx ends, then drains: no new jobs,
// the running ones finish or are handed back after DrainTimeout. Without credentials it
// speaks plaintext and refuses any address but loopback; with them it answers only callers
// whose certificate says orchestrator.
func Serve(ctx context.Context, lis net.Listener, jr JobRunner, tls *mesh.Credentials, o Options) error {
	if role := tls.Name(); o.Identity == "" && role != "" {
		o.Identity = identity(role)
	}
	log := telemetry.OrDiscard(o.Logger)
	s := mesh.NewServer(tls, mesh.ServerOptions{
		Logger: log, AllowedRoles: []string{mesh.RoleOrchestrator}, Registerer: o.Registerer, TracerProvider: o.TracerProvider, DrainTimeout: flushTimeout,
		ServerOptions: []grpc.ServerOption{grpc.ForceServerCodecV2(wire.Codec())},
	})
	h := Register(s, jr, o)
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(serving, lis) }()
	select {
	case err := <-ended:
		h.Close()
		return err
	case <-ctx.Done():
	}
	s.SetServing(false)
	log.Info("draining", "jobs", h.InFlight())
	drain, cancel := context.WithTimeout(serving, cmp.Or(o.DrainTimeout, defaultDrainTimeout))
	defer cancel()
	h.Drain(drain)
	stop()
	return <-ended
}

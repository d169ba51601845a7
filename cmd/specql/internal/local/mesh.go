package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/server"
)

// Options say what the mesh serves.
type Options struct {
	Registry spec.File
	Entities []spec.File
	// Alerts is a file of alerts alone; nil for none.
	Alerts *spec.File
	// Env chooses the overlay; empty for none.
	Env string
	// Data is the folder of the database; it is made if it is not there.
	Data string
	// Database is sqlite:PATH, the URL of a PostgreSQL database, or empty for specql.db in Data.
	Database string
	// Listen and Console are the addresses of the API and of the console, on loopback.
	Listen, Console string
	// Custom are the addresses of custom runners by execution type, in plaintext on loopback.
	Custom map[string]string
	// DrainTimeout is how long running jobs may take to end; 10 s if zero.
	DrainTimeout time.Duration
	Logger       *slog.Logger
	Version      string
}

// Ready is where a mesh that serves is reached.
type Ready struct {
	API, Console string
	// Runners are the addresses of the runners by execution type.
	Runners map[string]string
}

// Types are the execution types of the runners, sorted.
func (r Ready) Types() []string { return slices.Sorted(maps.Keys(r.Runners)) }

// Run serves until ctx ends, calls ready once the API answers, and drains at the end. It
// returns a *server.InvalidError where the registry has errors.
func Run(ctx context.Context, o Options, ready func(Ready)) (err error) {
	if err := o.CheckAddresses(); err != nil {
		return err
	}
	if err := os.MkdirAll(o.Data, 0o700); err != nil {
		return fmt.Errorf("the data folder: %w", err)
	}
	if o.Database == "" {
		o.Database = "sqlite:" + filepath.Join(o.Data, "specql.db")
	}
	api, err := listen("--listen", o.Listen)
	if err != nil {
		return err
	}
	console, err := listen("--console", o.Console)
	if err != nil {
		return errors.Join(err, api.Close())
	}
	authority, err := mesh.NewAuthority()
	if err != nil {
		return errors.Join(err, api.Close(), console.Close())
	}
	credentials, err := authority.Issue("orchestrator", "127.0.0.1", "localhost")
	if err != nil {
		return errors.Join(err, api.Close(), console.Close())
	}

	// The runners outlive the orchestrator, which drains through them.
	runnersCtx, endRunners := context.WithCancel(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	group := &group{cancel: cancel}
	traces := &traces{o: o}
	defer traces.close()
	addresses, err := startRunners(runnersCtx, o, authority, group, traces)
	var provider trace.TracerProvider
	if err == nil {
		provider, err = traces.of(ctx, "orchestrator")
	}
	if err == nil {
		err = server.Run(ctx, server.Options{
			Listener: api, Console: console,
			Database: o.Database,
			Registry: &o.Registry, Entities: o.Entities, Alerts: o.Alerts, Env: o.Env, LookupEnv: os.LookupEnv,
			Runners: addresses, RunnerCredentials: credentials,
			DrainTimeout: o.DrainTimeout, Logger: o.Logger, TracerProvider: provider, Version: o.Version,
			Ready: func(a server.Addresses) {
				ready(Ready{API: a.API, Console: a.Console, Runners: addresses})
			},
		})
	} else {
		err = errors.Join(err, api.Close(), console.Close())
	}
	endRunners()
	return errors.Join(err, group.wait())
}

// traces are those of the services, each under its own name.
type traces struct {
	o   Options
	all []*telemetry.Tracing
}

// of gives the provider of a service; nil where nothing is to be recorded.
func (t *traces) of(ctx context.Context, service string) (trace.TracerProvider, error) {
	tracing, err := telemetry.NewTracing(ctx, service, t.o.Version, t.o.Logger)
	if err != nil || tracing == nil {
		return nil, err
	}
	t.all = append(t.all, tracing)
	return tracing.Provider(), nil
}

// close exports the last spans.
func (t *traces) close() {
	for _, tracing := range t.all {
		if err := tracing.Close(); err != nil {
			t.o.Logger.Warn("traces", slog.Any("error", err))
		}
	}
}

// group runs parts that all end when one fails.
type group struct {
	all    sync.WaitGroup
	cancel context.CancelCauseFunc
	mu     sync.Mutex
	err    error
}

func (g *group) run(part string, do func() error) {
	g.all.Go(func() {
		if err := do(); err != nil {
			err = fmt.Errorf("%s: %w", part, err)
			g.mu.Lock()
			g.err = errors.Join(g.err, err)
			g.mu.Unlock()
			g.cancel(err)
		}
	})
}

func (g *group) wait() error {
	g.all.Wait()
	return g.err
}

func startRunners(ctx context.Context, o Options, authority *mesh.Authority, g *group, traces *traces) (map[string]string, error) {
	addresses := map[string]string{}
	all, err := builtIn(o.Logger, o.Data)
	if err != nil {
		return nil, err
	}
	for i, r := range all {
		if _, ok := o.Custom[r.Type]; ok {
			r.Close() // a custom runner takes its place
			continue
		}
		lis, creds, err := endpoint(authority, r.Role)
		if err != nil {
			closeAll(all[i:])
			return nil, err
		}
		provider, err := traces.of(ctx, r.Role)
		if err != nil {
			closeAll(all[i:])
			return nil, errors.Join(err, lis.Close())
		}
		addresses[r.Type] = lis.Addr().String()
		g.run(r.Role, func() error {
			defer r.Close()
			return runner.Serve(ctx, lis, r.JobRunner, creds, runner.Options{
				Logger: o.Logger.With(slog.String("service", r.Role)), TracerProvider: provider, Version: o.Version, DrainTimeout: time.Second,
			})
		})
	}
	for kind, target := range o.Custom {
		creds, err := authority.Issue(kind+"-runner", "127.0.0.1", "localhost")
		if err != nil {
			return nil, fmt.Errorf("--runner %s: %w", kind, err)
		}
		f, err := newFront(creds, strings.TrimPrefix(target, "dns:///"), o.Logger)
		if err != nil {
			return nil, fmt.Errorf("--runner %s: %w", kind, err)
		}
		addresses[kind] = f.lis.Addr().String()
		g.run(kind+"-runner", func() error { return f.serve(ctx) })
	}
	return addresses, nil
}

func endpoint(authority *mesh.Authority, role string) (net.Listener, *mesh.Credentials, error) {
	creds, err := authority.Issue(role, "127.0.0.1", "localhost")
	if err != nil {
		return nil, nil, err
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	return lis, creds, err
}

// CheckAddresses refuses addresses that are reached from other machines: the API is in
// plaintext and without tokens here.
func (o Options) CheckAddresses() error {
	for flag, address := range map[string]string{"--listen": o.Listen, "--console": o.Console} {
		if err := mesh.CheckInsecure(address); err != nil {
			return fmt.Errorf("%s: %s is not a loopback address, and what is served here is plaintext without tokens; run the orchestrator service to serve others", flag, address)
		}
	}
	for kind, address := range o.Custom {
		if err := mesh.CheckInsecure(address); err != nil {
			return fmt.Errorf("--runner %s: %w", kind, err)
		}
	}
	return nil
}

func listen(flag, address string) (net.Listener, error) {
	lis, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %s is in use, perhaps by another specql dev; choose another, such as %s 127.0.0.1:0", flag, address, flag)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	return lis, nil
}

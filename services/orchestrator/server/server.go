// Package server puts an orchestrator together: store, journal, engine, dispatch, registry
// and API behind one gRPC listener. It is what main starts and what `specql dev` starts.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/alert"
	"github.com/specql/mesh/services/orchestrator/internal/api"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/console"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/postgres"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
)

// Options say what an orchestrator works with.
type Options struct {
	// Listener of the gRPC API. Run closes it.
	Listener net.Listener
	// Credentials of the API; nil serves plaintext, which mesh allows on loopback alone.
	Credentials *mesh.Credentials
	// Auth says who may call the API and the console; nobody is asked where nil.
	Auth *Auth
	// Console is the listener of the console over HTTP; nil for none. Run closes it.
	Console net.Listener
	// Metrics is the listener of /metrics, /healthz and /readyz over HTTP; nil for none. Run closes it.
	Metrics net.Listener
	// Database is sqlite:PATH or the URL of a PostgreSQL database.
	Database string
	// Registry and Entities are what is in force at the start. Without a registry, what the
	// database has is in force.
	Registry *spec.File
	Entities []spec.File
	// Alerts is a file of alerts alone, beside those of the registry; nil for none.
	Alerts *spec.File
	// Reload reads Registry, Entities and Alerts anew into the options; nil where they do not change. What
	// it reads is put in force when it differs from what it read before, on all orchestrators of the database.
	Reload func(*Options) error
	// ReloadEvery is how often Reload is called; 0 means 5 s.
	ReloadEvery time.Duration
	// Env chooses the overlay.
	Env       string
	LookupEnv func(string) (string, bool)
	// Runners are the addresses by execution type, such as dns:///http-runner:9090.
	Runners map[string]string
	// RunnerCredentials are shown to runners; nil dials plaintext, on loopback alone.
	RunnerCredentials *mesh.Credentials
	// MaxRuns is how many runs are walked at once; others wait. 0 means 10,000.
	MaxRuns int
	// Retain is for how long runs are kept that have ended; 0 is for ever.
	Retain time.Duration
	// SchemaWait is how long to wait at the start for the database's schema to become the one
	// that this program needs; 0 fails at once.
	SchemaWait time.Duration
	// DrainTimeout is how long running jobs may take to end after ctx ended. 0 means 10 s.
	DrainTimeout time.Duration
	Logger       *slog.Logger
	// TracerProvider records what the orchestrator does; nil records nothing.
	TracerProvider trace.TracerProvider
	Version        string
	// Ready, if set, is called once the API answers.
	Ready func(Addresses)
}

// Auth says where the identities of callers come from.
type Auth = auth.Options

// OIDC is an issuer of tokens.
type OIDC = auth.OIDC

// Addresses are where an orchestrator listens.
type Addresses struct {
	API     string
	Console string
}

// InvalidError says that the registry or the entities have errors.
type InvalidError = spec.InvalidError

// Run serves until ctx ends, then drains: no new work is begun, running jobs end or are
// handed back. It returns an *InvalidError where the registry has errors.
func Run(ctx context.Context, o Options) (err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.LookupEnv == nil {
		o.LookupEnv = func(string) (string, bool) { return "", false }
	}
	closers := closeStack{}
	defer func() { err = errors.Join(err, closers.close()) }()
	closers.add(ignoreClosed(o.Listener.Close))
	if o.Console != nil {
		closers.add(ignoreClosed(o.Console.Close))
	}
	if o.Metrics != nil {
		closers.add(ignoreClosed(o.Metrics.Close))
	}
	var who auth.Options
	if o.Auth != nil {
		who = *o.Auth
	}
	who.Logger = o.Logger
	authenticator, err := auth.New(who)
	if err != nil {
		return err
	}
	m := newMetrics(slices.Concat([]string{"http", "shell", "docker", "serverless"}, slices.Collect(maps.Keys(o.Runners))))

	serving, stop := context.WithCancel(ctx)
	group, gctx := errgroup.WithContext(serving)
	defer func() {
		stop()
		_ = group.Wait() // what it gave was returned, or something before it failed
	}()
	start := &starting{}
	if o.Metrics != nil {
		group.Go(func() error {
			return telemetry.ServeHTTP(gctx, o.Metrics, telemetry.Handler(m.registry, func(context.Context) error {
				return cmp.Or(gctx.Err(), start.waitsFor())
			}))
		})
	}
	st, err := openStore(gctx, o, start)
	if err != nil {
		return err
	}
	closers.add(st.Close)
	journal := store.NewJournal(st, store.JournalOptions{Logger: o.Logger, OnCommit: m.commit})
	closers.add(journal.Close)
	var eng *engine.Engine
	dispatcher, err := dispatch.New(dispatch.Options{
		Runners: o.Runners, Credentials: o.RunnerCredentials, Logger: o.Logger, TracerProvider: o.TracerProvider,
		Renew: func() bool { return eng.Renew() }, // nothing is dispatched before there is an engine
	})
	if err != nil {
		return err
	}
	closers.add(func() error { dispatcher.Close(); return nil })
	clock := engine.SystemClock{}
	reg := registry.New(st, dispatcher, o.LookupEnv, clock.Now)
	if err := loadRegistry(ctx, reg, o); err != nil {
		return err
	}
	owner, err := uuid.NewV7()
	if err != nil {
		return fmt.Errorf("name this orchestrator: %w", err)
	}
	in := &intake.Intake{Registry: reg, Rows: st}
	eng = engine.New(engine.Options{
		Journal: journal, Store: st, Plans: reg, Dispatcher: dispatcher, Clock: clock, Logger: o.Logger,
		Owner: owner.String(), Intake: in, Refresh: reg.Refresh, Retain: o.Retain, MaxRuns: o.MaxRuns, ParkAfter: parkAfter, Observer: m, TracerProvider: o.TracerProvider,
	})
	m.walking(eng.Walking)
	drain := cmp.Or(o.DrainTimeout, 10*time.Second)
	closers.add(func() error {
		cctx, cancel := context.WithTimeout(context.Background(), drain)
		defer cancel()
		eng.Close(cctx)
		return nil
	})

	srv := mesh.NewServer(o.Credentials, mesh.ServerOptions{
		Logger: o.Logger, Registerer: m.registry, TracerProvider: o.TracerProvider, ServerOptions: append(authenticator.Interceptors(), api.Interceptors()...),
		// People have tokens, not certificates.
		OptionalClientCert: authenticator.Enabled(),
		// A runner is called and never calls: one that does is not itself any more.
		MayCall: func(_, role string) bool { return !strings.HasSuffix(role, "-runner") },
	})
	specqlv1.RegisterOrchestratorServiceServer(srv, &api.Orchestrator{Engine: eng, Store: st, Registry: reg, Intake: in, Logger: o.Logger})
	specqlv1.RegisterRegistryServiceServer(srv, &api.Registry{Registry: reg, Runners: dispatcher, Types: st, Refresh: eng.Refreshed, Logger: o.Logger})
	specqlv1.RegisterInsightServiceServer(srv, &api.Insight{Store: st, Alerts: st, Registry: reg, Checkers: dispatcher})

	if o.Console != nil {
		if err := serveConsole(gctx, group, o, st, authenticator, mesh.NewDenials(o.Logger, m.registry)); err != nil {
			return err
		}
	}
	if n, err := eng.Join(ctx); err != nil {
		return err
	} else if n > 0 {
		o.Logger.Info("runs go on where they were", "runs", n)
	}
	group.Go(func() error { return srv.Serve(gctx, o.Listener) })
	group.Go(func() error {
		alert.Run(gctx, alert.Options{
			Store: st, Alerts: func() []*spec.Alert { return reg.Current().Registry.Alerts }, Clock: clock, Logger: o.Logger, Owner: owner.String(),
			Changed: m.alertChanged, Notify: func(ctx context.Context, service, operation string, input map[string]any, key string) (string, error) {
				return notify(ctx, in, eng, service, operation, input, key)
			},
		})
		return nil
	})
	if o.Reload != nil && o.Registry != nil {
		group.Go(func() error {
			(&reloader{o: o, registry: reg, reloads: newReloads(m.registry)}).follow(gctx)
			return nil
		})
	}
	start.set(nil)
	if o.Ready != nil {
		a := Addresses{API: o.Listener.Addr().String()}
		if o.Console != nil {
			a.Console = o.Console.Addr().String()
		}
		o.Ready(a)
	}
	return group.Wait()
}

// notify begins the run that tells of an alert, once for each key.
func notify(ctx context.Context, in *intake.Intake, eng *engine.Engine, service, operation string, input map[string]any, key string) (string, error) {
	start, err := in.PrepareCall(ctx, service, operation, input, key, store.AlertSubject)
	if err != nil {
		return "", err
	}
	run, err := eng.Start(ctx, start)
	if dup, ok := errors.AsType[*store.DuplicateError](err); ok {
		return dup.RunID, nil
	}
	if err != nil {
		return "", err
	}
	return run.ID, nil
}

// starting is what an orchestrator waits for that is not ready yet.
type starting struct {
	mu    sync.Mutex
	ready bool
	cause error
}

// set says what is waited for; nil for nothing any more.
func (s *starting) set(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready, s.cause = cause == nil, cause
}

func (s *starting) waitsFor() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready {
		return nil
	}
	return cmp.Or(s.cause, errors.New("starting"))
}

// parkAfter is how long a run has to sleep for its walk to end meanwhile. To walk it again costs a read of all its steps.
const parkAfter = 30 * time.Second

// openWait is how long an orchestrator that starts waits for its PostgreSQL.
const openWait = time.Minute

func openStore(ctx context.Context, o Options, start *starting) (store.Store, error) {
	scheme, path, _ := strings.Cut(o.Database, ":")
	switch {
	case scheme == "sqlite" && path != "":
		st, err := sqlite.Open(ctx, sqlite.Options{Path: path, Logger: o.Logger})
		if err != nil {
			return nil, fmt.Errorf("open the database: %w", err)
		}
		return st, nil
	case scheme == "postgres" || scheme == "postgresql":
		for began := time.Now(); ; {
			st, err := postgres.Open(ctx, postgres.Options{URL: o.Database, Logger: o.Logger})
			if err == nil {
				return st, nil
			}
			wait := openWait
			switch {
			case errors.Is(err, store.ErrNotReady):
				wait = o.SchemaWait
			case !errors.Is(err, store.ErrUnavailable):
				wait = 0
			}
			if time.Since(began) >= wait || ctx.Err() != nil {
				return nil, fmt.Errorf("open the database: %w", err)
			}
			o.Logger.Warn("waiting for the database", "error", err)
			start.set(err)
			if err := (engine.SystemClock{}).Sleep(ctx, time.Second); err != nil {
				return nil, fmt.Errorf("open the database: %w", err)
			}
		}
	}
	return nil, fault.New(fault.Validation, "--database: this is no database that is known; write sqlite:PATH, or postgres://USER@HOST/DATABASE")
}

// documents are the registry's files.
func documents(o *Options) registry.Documents {
	docs := registry.FromFiles(*o.Registry, o.Entities, o.Env)
	if o.Alerts != nil {
		docs.Alerts = registry.Document{Name: o.Alerts.Name, Content: string(o.Alerts.Content)}
	}
	return docs
}

func loadRegistry(ctx context.Context, reg *registry.Registry, o Options) error {
	if o.Registry == nil {
		return reg.Load(ctx)
	}
	s, problems, err := reg.ApplyFiles(ctx, documents(&o))
	if err != nil {
		return err
	}
	if s == nil {
		return &InvalidError{Problems: problems}
	}
	for _, p := range problems {
		o.Logger.Warn("the registry has a warning", "problem", p.String())
	}
	return nil
}

func serveConsole(ctx context.Context, group *errgroup.Group, o Options, st store.Store, authenticator *auth.Authenticator, denials *mesh.Denials) error {
	// It speaks plaintext, and is for this machine alone.
	if err := mesh.CheckInsecure(o.Console.Addr().String()); err != nil {
		return fmt.Errorf("--console: %w", err)
	}
	handler, err := console.New(st, authenticator, o.Logger, denials)
	if err != nil {
		return err
	}
	web := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
	}
	group.Go(func() error {
		if err := web.Serve(o.Console); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the console: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return web.Close()
	})
	return nil
}

// closeStack closes things in the reverse order.
type closeStack []func() error

func (c *closeStack) add(f func() error) { *c = append(*c, f) }

func (c *closeStack) close() error {
	var errs []error
	for _, f := range slices.Backward(*c) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func ignoreClosed(f func() error) func() error {
	return func() error {
		if err := f(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

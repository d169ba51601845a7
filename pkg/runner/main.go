package runner

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v4"

	"github.com/specql/mesh/pkg/config"
	"github.com/specql/mesh/pkg/memory"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/pkg/telemetry/scrape"
)

// defaultListen is where a runner listens; without TLS it is loopback.
const (
	defaultListen  = ":9090"
	insecureListen = "127.0.0.1:9090"
	maxPolicyBytes = 1 << 20
	// garbage is how many bytes of it may gather before they are collected.
	garbage = 32 << 20
)

// Env is what [Main] gives to the program that it starts.
type Env struct {
	Logger *slog.Logger
	// PolicyJSON is the operator's ceiling from --policy as a JSON object; nil without one.
	PolicyJSON json.RawMessage
	// Flags are parsed, those of [Flags] included.
	Flags *pflag.FlagSet
}

// MainOption changes [Main].
type MainOption func(*mainOptions)

type mainOptions struct{ define []func(*pflag.FlagSet) }

// Flags adds flags of the program's own. Each has its SPECQL_ variable like all others.
func Flags(define func(*pflag.FlagSet)) MainOption {
	return func(o *mainOptions) { o.define = append(o.define, define) }
}

// Main is the program of a runner service: it reads flags and SPECQL_ variables, calls
// build, and serves until SIGTERM or SIGINT, then drains; a second signal ends at once. It
// returns the exit status: 0 done, 1 failed, 2 used wrongly. A runner with a Close method
// is closed at the end.
//
//	func main() { os.Exit(runner.Main("wasm-runner", build)) }
func Main(name string, build func(context.Context, *Env) (JobRunner, error), options ...MainOption) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from then on a signal ends the process
	memory.AllowGarbage(garbage)
	return program{name: name, build: build, options: options, lookup: os.LookupEnv, out: os.Stderr}.run(ctx, os.Args[1:])
}

type program struct {
	name    string
	build   func(context.Context, *Env) (JobRunner, error)
	options []MainOption
	lookup  func(string) (string, bool)
	out     io.Writer
}

type settings struct {
	listen, metrics string
	cert, key, ca   string
	insecure        bool
	concurrency     int
	policy          string
	drain           time.Duration
	level, format   string
	version         bool
	build           *Env
	credentials     *mesh.Credentials
	tracing         *telemetry.Tracing
}

func (p program) run(ctx context.Context, args []string) int {
	s, err := p.settings(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return 0
	case err != nil:
		_, _ = fmt.Fprintf(p.out, "%s: %v\n", p.name, err)
		return 2
	case s.version:
		_, _ = fmt.Fprintf(p.out, "%s %s\n", p.name, version())
		return 0
	}
	if err := p.serve(ctx, s); err != nil {
		s.build.Logger.Error("ended", "error", err)
		return 1
	}
	return 0
}

// settings reads and checks everything that can be wrong before anything is started.
func (p program) settings(args []string) (*settings, error) {
	var s settings
	fs := pflag.NewFlagSet(p.name, pflag.ContinueOnError)
	fs.SetOutput(p.out)
	fs.SortFlags = false
	fs.StringVar(&s.listen, "listen", defaultListen, "address of the gRPC service; with --insecure "+insecureListen+" if not given")
	fs.StringVar(&s.metrics, "metrics", "", "address of /metrics, /healthz and /readyz over HTTP; none if empty")
	fs.StringVar(&s.cert, "tls-cert", "", "file of this service's certificate")
	fs.StringVar(&s.key, "tls-key", "", "file of the certificate's key")
	fs.StringVar(&s.ca, "tls-ca", "", "file of the CA that callers' certificates come from")
	fs.BoolVar(&s.insecure, "insecure", false, "speak plaintext, on loopback alone")
	fs.IntVar(&s.concurrency, "max-concurrency", defaultMaxConcurrency, "how many jobs may run at once")
	fs.StringVar(&s.policy, "policy", "", "file of the operator's ceiling, in the terms of security_policy (YAML or JSON)")
	fs.DurationVar(&s.drain, "drain-timeout", defaultDrainTimeout, "how long running jobs may go on after SIGTERM")
	fs.StringVar(&s.level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&s.format, "log-format", "text", "text or json")
	fs.BoolVar(&s.version, "version", false, "print the version and end")
	var o mainOptions
	for _, option := range p.options {
		option(&o)
	}
	for _, define := range o.define {
		define(fs)
	}
	if err := fs.Parse(args); err != nil {
		return nil, fmt.Errorf("flags: %w", err)
	}
	if s.version {
		return &s, nil
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("%q is not a flag", fs.Arg(0))
	}
	if err := config.BindFrom(fs, p.lookup); err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	if err := s.check(fs); err != nil {
		return nil, err
	}
	policy, err := readPolicy(s.policy)
	if err != nil {
		return nil, err
	}
	s.build = &Env{Logger: telemetry.NewLogger(p.out, s.level, s.format).With("service", p.name), PolicyJSON: policy, Flags: fs}
	if s.tracing, err = telemetry.NewTracing(context.Background(), p.name, version(), s.build.Logger); err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	return &s, nil
}

func (s *settings) check(fs *pflag.FlagSet) error {
	if s.concurrency < 1 || s.concurrency > 100_000 {
		return fmt.Errorf("--max-concurrency is %d, and must be 1 to 100000", s.concurrency)
	}
	if s.drain < 0 {
		return errors.New("--drain-timeout must not be negative")
	}
	if _, err := telemetry.ParseLevel(s.level); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	if err := telemetry.CheckFormat(s.format); err != nil {
		return fmt.Errorf("--log-format: %w", err)
	}
	if s.insecure {
		if s.cert != "" || s.key != "" || s.ca != "" {
			return errors.New("--insecure and --tls-cert, --tls-key or --tls-ca exclude one another")
		}
		if !fs.Changed("listen") {
			s.listen = insecureListen
		}
		if err := mesh.CheckInsecure(s.listen); err != nil {
			return fmt.Errorf("--insecure: %w", err)
		}
		return nil
	}
	if err := config.Require(fs, "tls-cert", "tls-key", "tls-ca"); err != nil {
		return fmt.Errorf("%w\n`specql certs DIR` makes certificates; --insecure serves loopback without them", err)
	}
	credentials, err := mesh.LoadCredentials(s.cert, s.key, s.ca)
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	s.credentials = credentials
	return nil
}

func (p program) serve(ctx context.Context, s *settings) (err error) {
	log := s.build.Logger
	defer func() {
		if cerr := s.tracing.Close(); cerr != nil {
			log.Warn("traces", "error", cerr)
		}
	}()
	jr, err := p.build(ctx, s.build)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	defer func() {
		switch c := jr.(type) {
		case io.Closer:
			err = errors.Join(err, c.Close())
		case interface{ Close() }:
			c.Close()
		}
	}()
	var listen net.ListenConfig
	lis, err := listen.Listen(ctx, "tcp", s.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	registry := scrape.NewRegistry()
	if s.metrics != "" {
		metrics, err := listen.Listen(ctx, "tcp", s.metrics)
		if err != nil {
			return errors.Join(fmt.Errorf("--metrics: %w", err), lis.Close())
		}
		// It serves until the drain is over, so that its last figures can be read.
		end, stop := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := telemetry.ServeHTTP(end, metrics, telemetry.Handler(registry, func(context.Context) error {
				if ctx.Err() != nil {
					return errors.New("draining")
				}
				return nil
			})); err != nil {
				log.Error("metrics ended", "error", err)
			}
		}()
		defer func() {
			stop()
			<-done
		}()
		log.Info("metrics", "address", metrics.Addr().String())
	}
	log.Info("ready", "address", lis.Addr().String(), "version", version(), "max_concurrency", s.concurrency, "tls", s.credentials != nil)
	err = Serve(ctx, lis, jr, s.credentials, Options{
		MaxConcurrency: s.concurrency, Logger: log, Version: version(), Registerer: registry, TracerProvider: s.tracing.Provider(),
		// Zero would mean the default.
		DrainTimeout: max(s.drain, time.Millisecond),
	})
	if err == nil {
		log.Info("drained")
	}
	return err
}

// readPolicy reads the ceiling as JSON.
func readPolicy(name string) (json.RawMessage, error) {
	if name == "" {
		return nil, nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	if info.Size() > maxPolicyBytes {
		return nil, fmt.Errorf("--policy: %s has %d bytes, more than the %d allowed", name, info.Size(), maxPolicyBytes)
	}
	text, err := os.ReadFile(name) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	var policy map[string]any
	if err := yaml.Unmarshal(text, &policy); err != nil {
		return nil, fmt.Errorf("--policy: %s: %w", name, err)
	}
	if policy == nil {
		policy = map[string]any{}
	}
	raw, err := json.Marshal(policy)
	if err != nil {
		return nil, fmt.Errorf("--policy: %s: %w", name, err)
	}
	return raw, nil
}

// version is the program's version as the Go tool recorded it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return cmp.Or(info.Main.Version, "(devel)")
}

// Command orchestrator serves the orchestrator: the gRPC API, and behind it the engine, the
// store and the connections to the runners.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/config"
	"github.com/specql/mesh/pkg/memory"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/pkg/timerslack"
	"github.com/specql/mesh/services/orchestrator/server"
)

func main() {
	timerslack.Allow(timerslack.Services)
	os.Exit(run())
}

// garbage is how many bytes of it may gather before they are collected.
const garbage = 64 << 20

type settings struct {
	listen, console, metrics                  string
	database, registry, entities, alerts, env string
	runners                                   []string
	maxRuns                                   int
	drain, schemaWait                         time.Duration
	retain                                    string
	cert, key, ca                             string
	authTokens, issuer, audience              string
	rolesClaim, tenantClaim                   string
	roleValues, tenantValues                  []string
	insecure, version                         bool
	level, format                             string
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from then on a signal ends the process
	var s settings
	flags := pflag.NewFlagSet("orchestrator", pflag.ContinueOnError)
	flags.SortFlags = false
	flags.StringVar(&s.listen, "listen", "127.0.0.1:7350", "address of the gRPC API")
	flags.StringVar(&s.console, "console", "", "address of the console over HTTP; none if empty")
	flags.StringVar(&s.metrics, "metrics", "", "address of /metrics, /healthz and /readyz over HTTP; none if empty")
	flags.StringVar(&s.database, "database", "", "sqlite:PATH, or the URL of a PostgreSQL database, such as postgres://specql@db/specql")
	flags.StringVar(&s.registry, "registry", "", "file of the service registry; without it, what the database has is in force")
	flags.StringVar(&s.entities, "entities", "", "folder of the entity files")
	flags.StringVar(&s.alerts, "alerts", "", "file of alerts, beside those of the registry")
	flags.StringVar(&s.env, "env", "", "overlay of the registry, such as production")
	flags.StringSliceVar(&s.runners, "runner", nil, "TYPE=ADDRESS of a runner, such as http=dns:///http-runner:9090; repeatable")
	flags.IntVar(&s.maxRuns, "max-runs", 10_000, "how many runs are walked at once; others wait")
	flags.StringVar(&s.retain, "retain", "", "for how long runs are kept that have ended, such as 30d or 12h; for ever if empty")
	flags.DurationVar(&s.schemaWait, "schema-wait", 0, "how long to wait at the start for 'specql migrate-schema' to be run; not at all if 0")
	flags.DurationVar(&s.drain, "drain-timeout", 30*time.Second, "how long running jobs may go on after SIGTERM")
	flags.StringVar(&s.cert, "tls-cert", "", "file of this service's certificate")
	flags.StringVar(&s.key, "tls-key", "", "file of the certificate's key")
	flags.StringVar(&s.ca, "tls-ca", "", "file of the CA of the mesh")
	flags.StringVar(&s.authTokens, "auth-tokens", "", "file of the tokens that callers of the API and the console need; `specql token` makes them")
	flags.StringVar(&s.issuer, "auth-oidc-issuer", "", "URL of an OIDC issuer whose tokens are taken; may go together with --auth-tokens")
	flags.StringVar(&s.audience, "auth-oidc-audience", "", "what the issuer's tokens have to be for")
	flags.StringVar(&s.rolesClaim, "auth-oidc-roles-claim", "roles", "claim that has the role; dots lead into claims, such as realm_access.roles")
	flags.StringSliceVar(&s.roleValues, "auth-oidc-role", nil, "VALUE=ROLE: what a value of the claim means, such as mesh-admins=admin; repeatable; without any, values are viewer, operator and admin")
	flags.StringVar(&s.tenantClaim, "auth-oidc-tenant-claim", "tenant", "claim that has the tenants")
	flags.StringSliceVar(&s.tenantValues, "auth-oidc-tenant", nil, "VALUE=TENANT: what a value of the claim means, * being all tenants; repeatable; without any, values are names of tenants")
	flags.BoolVar(&s.insecure, "insecure", false, "speak plaintext to clients and runners, on loopback alone")
	flags.StringVar(&s.level, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&s.format, "log-format", "text", "text or json")
	flags.BoolVar(&s.version, "version", false, "print the version and end")
	err := flags.Parse(os.Args[1:])
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return 0
	case err == nil && s.version:
		fmt.Println("orchestrator " + version()) //nolint:forbidigo // what was asked for
		return 0
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("%q is not a flag", flags.Arg(0))
	case err == nil:
		err = config.Bind(flags)
	}
	var o server.Options
	if err == nil {
		o, err = s.options(flags)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "orchestrator: %v\n", err)
		return 2
	}
	memory.AllowGarbage(garbage)
	tracing, err := telemetry.NewTracing(ctx, "orchestrator", o.Version, o.Logger)
	if err != nil {
		fmt.Fprintf(os.Stderr, "orchestrator: %v\n", err)
		return 2
	}
	if tracing != nil {
		o.TracerProvider = tracing.Provider()
	}
	if err := listen(ctx, &s, &o); err != nil {
		o.Logger.Error("ended", "error", err)
		return 1
	}
	err = server.Run(ctx, o)
	if cerr := tracing.Close(); cerr != nil {
		o.Logger.Warn("traces", "error", cerr)
	}
	var invalid *server.InvalidError
	switch {
	case errors.As(err, &invalid):
		for _, p := range invalid.Problems {
			fmt.Fprintln(os.Stderr, p)
		}
		return 2
	case err != nil:
		o.Logger.Error("ended", "error", err)
		return 1
	}
	o.Logger.Info("drained")
	return 0
}

// options reads and checks everything that can be wrong before anything is started.
func (s *settings) options(flags *pflag.FlagSet) (server.Options, error) {
	o := server.Options{Env: s.env, Database: s.database, LookupEnv: os.LookupEnv, MaxRuns: s.maxRuns, SchemaWait: s.schemaWait, DrainTimeout: s.drain, Version: version()}
	if _, err := telemetry.ParseLevel(s.level); err != nil {
		return o, fmt.Errorf("--log-level: %w", err)
	}
	if err := telemetry.CheckFormat(s.format); err != nil {
		return o, fmt.Errorf("--log-format: %w", err)
	}
	o.Logger = telemetry.NewLogger(os.Stderr, s.level, s.format).With("service", "orchestrator")
	var err error
	if err := config.Require(flags, "database"); err != nil {
		return o, err
	}
	if s.maxRuns < 1 {
		return o, errors.New("--max-runs has to be at least 1")
	}
	if o.Retain, err = duration(s.retain); err != nil {
		return o, fmt.Errorf("--retain: %w", err)
	}
	o.Runners = map[string]string{}
	for _, r := range s.runners {
		name, address, ok := strings.Cut(r, "=")
		if !ok || name == "" || address == "" {
			return o, fmt.Errorf("--runner: %q is not TYPE=ADDRESS, such as http=dns:///http-runner:9090", r)
		}
		if _, twice := o.Runners[name]; twice {
			return o, fmt.Errorf("--runner: %s is given twice", name)
		}
		o.Runners[name] = address
	}
	if s.insecure {
		if err := mesh.CheckInsecure(s.listen); err != nil {
			return o, fmt.Errorf("--insecure: %w", err)
		}
	} else {
		if err := config.Require(flags, "tls-cert", "tls-key", "tls-ca"); err != nil {
			return o, fmt.Errorf("%w\n--insecure serves loopback without them", err)
		}
		credentials, err := mesh.LoadCredentials(s.cert, s.key, s.ca)
		if err != nil {
			return o, fmt.Errorf("certificates: %w", err)
		}
		o.Credentials, o.RunnerCredentials = credentials, credentials
	}
	if err := s.identities(&o); err != nil {
		return o, err
	}
	return o, s.documents(&o)
}

// identities reads the flags that say who may call.
func (s *settings) identities(o *server.Options) error {
	if s.authTokens == "" && s.issuer == "" {
		if s.audience != "" || len(s.roleValues)+len(s.tenantValues) > 0 {
			return errors.New("--auth-oidc-audience, --auth-oidc-role and --auth-oidc-tenant need --auth-oidc-issuer")
		}
		return nil
	}
	o.Auth = &server.Auth{Tokens: s.authTokens}
	if s.issuer == "" {
		return nil
	}
	if s.audience == "" {
		return errors.New("--auth-oidc-issuer needs --auth-oidc-audience: tokens of the issuer that are for other services must not be taken")
	}
	oidc := &server.OIDC{Issuer: s.issuer, Audience: s.audience, RolesClaim: s.rolesClaim, TenantClaim: s.tenantClaim}
	var err error
	if oidc.Roles, err = pairs("auth-oidc-role", s.roleValues); err != nil {
		return err
	}
	if oidc.Tenants, err = pairs("auth-oidc-tenant", s.tenantValues); err != nil {
		return err
	}
	o.Auth.OIDC = oidc
	return nil
}

// pairs reads VALUE=NAME; the value may have an = of its own.
func pairs(flag string, texts []string) (map[string]string, error) {
	out := map[string]string{}
	for _, text := range texts {
		i := strings.LastIndexByte(text, '=')
		if i < 1 || i == len(text)-1 {
			return nil, fmt.Errorf("--%s: %q is not VALUE=NAME, such as mesh-admins=admin", flag, text)
		}
		if _, twice := out[text[:i]]; twice {
			return nil, fmt.Errorf("--%s: %s is given twice", flag, text[:i])
		}
		out[text[:i]] = text[i+1:]
	}
	return out, nil
}

// duration reads a positive duration that may be in days, such as 30d; zero for the empty text.
func duration(text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n int
		if n, err = strconv.Atoi(days); err == nil && n <= maxDays {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is no positive duration, such as 30d or 12h", text)
	}
	return d, nil
}

// maxDays is the most that a duration holds.
const maxDays = 100_000

func (s *settings) documents(o *server.Options) error {
	if s.registry == "" {
		if s.entities != "" {
			return errors.New("--entities needs --registry")
		}
		if s.alerts != "" {
			return errors.New("--alerts needs --registry")
		}
		return nil
	}
	o.Reload = s.read
	return s.read(o)
}

// read reads the registry, the alerts and the entities.
func (s *settings) read(o *server.Options) error {
	content, err := os.ReadFile(s.registry)
	if err != nil {
		return fmt.Errorf("--registry: %w", err)
	}
	o.Registry = &spec.File{Name: s.registry, Content: content}
	if s.alerts != "" {
		content, err := os.ReadFile(s.alerts)
		if err != nil {
			return fmt.Errorf("--alerts: %w", err)
		}
		o.Alerts = &spec.File{Name: s.alerts, Content: content}
	}
	if s.entities == "" {
		return nil
	}
	err = filepath.WalkDir(s.entities, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != s.entities && strings.HasPrefix(d.Name(), "..") {
			// A mounted ConfigMap keeps its files in such a folder, and has links to them beside it.
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if err != nil || d.IsDir() || !slices.Contains([]string{".yaml", ".yml"}, filepath.Ext(path)) {
			return err
		}
		content, err := os.ReadFile(path) //nolint:gosec // the operator names the folder
		if err != nil {
			return err
		}
		o.Entities = append(o.Entities, spec.File{Name: path, Content: content})
		return nil
	})
	if err != nil {
		return fmt.Errorf("--entities: %w", err)
	}
	return nil
}

func listen(ctx context.Context, s *settings, o *server.Options) error {
	var lc net.ListenConfig
	var err error
	if o.Listener, err = lc.Listen(ctx, "tcp", s.listen); err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	opened := []net.Listener{o.Listener}
	for _, extra := range []struct {
		flag, address string
		to            *net.Listener
	}{{"console", s.console, &o.Console}, {"metrics", s.metrics, &o.Metrics}} {
		if extra.address == "" {
			continue
		}
		l, err := lc.Listen(ctx, "tcp", extra.address)
		if err != nil {
			err = fmt.Errorf("--%s: %w", extra.flag, err)
			for _, open := range opened {
				err = errors.Join(err, open.Close())
			}
			return err
		}
		*extra.to, opened = l, append(opened, l)
	}
	o.Ready = func(a server.Addresses) {
		o.Logger.Info("ready", "api", a.API, "console", a.Console, "version", o.Version)
	}
	return nil
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "devel"
}

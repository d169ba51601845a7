package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/sandbox"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/server"
)

func newDev(s IO) *cobra.Command {
	var (
		o                   local.Options
		registry, entities  string
		alerts              string
		runners             []string
		logLevel, logFormat string
	)
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Runs the whole mesh in one process, for development",
		Long: "Runs the orchestrator and every runner in this process, each behind its own listener, with mutual TLS\n" +
			"between them and an embedded database. The API is plaintext on loopback. Once it answers, one line on\n" +
			"standard output says where: ready api=HOST:PORT console=HOST:PORT. Ctrl-C drains and ends it.\n\n" +
			"Without --registry and --entities: registry/service_registry.yaml and entities/ of this folder if they\n" +
			"are there, else the bundled examples. A PostgreSQL database needs its schema first: `specql migrate-schema`\n" +
			"makes it. Every flag has a variable: --data is SPECQL_DATA.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.bind(cmd.Flags()); err != nil {
				return err
			}
			if _, err := telemetry.ParseLevel(logLevel); err != nil {
				return &usageError{err}
			}
			if err := telemetry.CheckFormat(logFormat); err != nil {
				return &usageError{err}
			}
			var err error
			if o.Custom, err = (&runnerFlags{runners: runners}).addresses(); err != nil {
				return err
			}
			if err := o.CheckAddresses(); err != nil {
				return misuse("%w", err)
			}
			if isPostgreSQL(o.Database) {
				if err := checkDatabaseURL(o.Database); err != nil {
					return err
				}
			}
			o.Logger = telemetry.NewLogger(s.Err, logLevel, logFormat)
			o.Version = s.Version
			documents, err := local.Load(registry, entities, o.Env, o.Data)
			if err != nil {
				return misuse("%w", err)
			}
			if alerts != "" {
				file, err := local.ReadFile(alerts)
				if err != nil {
					return misuse("--alerts: %w", err)
				}
				o.Alerts = &file
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			ended := context.AfterFunc(ctx, func() {
				stop() // from then on a signal ends the process at once
				s.say("stopping: running jobs may take %s to end; Ctrl-C again leaves at once", o.DrainTimeout)
			})
			defer ended()
			return dev(ctx, s, o, documents)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&registry, "registry", "", "the service registry")
	fs.StringVar(&entities, "entities", "", "folder of the entity files")
	fs.StringVar(&alerts, "alerts", "", "file of alerts, beside those of the registry")
	fs.StringVar(&o.Env, "env", "", "the overlay; development if the registry has one")
	fs.StringVar(&o.Data, "data", ".specql", "folder of the database")
	fs.StringVar(&o.Listen, "listen", defaultAddress, "address of the API, on loopback")
	fs.StringVar(&o.Console, "console", "127.0.0.1:7351", "address of the console, on loopback")
	fs.StringVar(&o.Database, "database", "", "sqlite:PATH or the URL of a PostgreSQL database, in place of specql.db in --data")
	fs.StringSliceVar(&runners, "runner", nil, "TYPE=ADDRESS of a custom runner on loopback that was started with --insecure (repeatable, or with commas)")
	fs.DurationVar(&o.DrainTimeout, "drain-timeout", 10*time.Second, "how long running jobs may take to end at the end")
	fs.StringVar(&logLevel, "log-level", "warn", "debug, info, warn or error")
	fs.StringVar(&logFormat, "log-format", "text", "text or json")
	return cmd
}

func dev(ctx context.Context, s IO, o local.Options, d local.Documents) error {
	box, endpoints, err := local.Prepare(d)
	if box != nil {
		defer func() { _ = box.Close() }()
	}
	if err != nil {
		return err
	}
	o.Registry, o.Entities, o.Env = d.Registry, d.Entities, d.Env
	if d.Examples != "" && bytes.Contains(d.Registry.Content, []byte(local.Image)) {
		s.say("making the Docker image %s of the examples", local.Image)
		if err := local.BuildImage(ctx); err != nil {
			o.Logger.WarnContext(ctx, "the examples' Docker image was not built: their Docker actions will fail", slog.Any("error", err))
		}
	}
	err = local.Run(ctx, o, func(r local.Ready) {
		s.introduce(o, d, endpoints, r)
		_, _ = fmt.Fprintf(s.Out, "ready api=%s console=%s\n", r.API, r.Console)
	})
	if _, ok := errors.AsType[*server.InvalidError](err); !ok && isPostgreSQL(o.Database) {
		err = (&database{url: o.Database}).hide(err)
	}
	return s.invalid(err)
}

// introduce tells people what runs where.
func (s IO) introduce(o local.Options, d local.Documents, endpoints []*sandbox.Endpoint, r local.Ready) {
	env := ""
	if d.Env != "" {
		env = ", overlay " + d.Env
	}
	s.say("registry  %s%s, %s", terminal.Clean(d.Registry.Name), terminal.Clean(env), count(len(d.Entities), "entity file"))
	s.say("api       %s (plaintext gRPC, this machine alone)", r.API)
	s.say("console   http://%s", r.Console)
	for _, kind := range r.Types() {
		note := ""
		if custom := o.Custom[kind]; custom != "" {
			note = ", in front of " + custom
		}
		s.say("runner    %s at %s (mutual TLS%s)", terminal.Clean(kind), r.Runners[kind], terminal.Clean(note))
	}
	for _, e := range endpoints {
		s.say("sandbox   %s stands in for %s (%s)", e.URL, e.Name, e.Variable)
	}
	s.say("data      %s", terminal.Clean(o.Data))
	if o.Database != "" {
		s.say("database  %s", terminal.Clean(redactURL(o.Database)))
	}
	if d.Examples != "" {
		s.say("try       specql execute-job --entity payment --action process_payment")
	}
}

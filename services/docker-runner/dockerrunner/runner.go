// Package dockerrunner carries out calls in containers of a Docker engine.
//
// A container gets no capability, no new privileges, the engine's seccomp profile, no
// namespace of the host, a read-only root and no network unless its service says and the
// policies allow otherwise. It is removed before its job counts as finished; what a crashed
// runner left behind is found by labels and removed.
package dockerrunner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/client"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// ExecutionType is the execution_type that the runner serves.
const ExecutionType = "docker"

// Options of a [Runner]. The zero value is usable.
type Options struct {
	// Host is the engine's address, such as unix:///var/run/docker.sock or
	// tcp://docker:2376. Empty: DOCKER_HOST, DOCKER_TLS_VERIFY and so on, else the default socket.
	Host string
	// Ceiling is the operator's policy, checked besides the registry's. Nil: none.
	Ceiling *Policy
	// Logger; nil discards.
	Logger *slog.Logger
	// StateDir holds a directory for the output of each running job. Empty: /run/specql-docker
	// for root, a directory of the user's own below the temporary directory for others.
	StateDir string
	// DeniedPaths are directories of this host that no container gets to see, with all that
	// lies in them, such as the data directory of the mesh.
	DeniedPaths []string
	// Isolation is what holds the process itself, besides what holds its containers.
	Isolation []runner.Feature
	// RequireIsolation names features without which New fails, and jobs are refused once they
	// are lost; all for every one. The engine must answer then.
	RequireIsolation []string
}

// Runner is a [runner.JobRunner] on a Docker engine. Make it with [New].
type Runner struct {
	client  *client.Client
	ceiling *Policy
	log     *slog.Logger
	owner   owner
	state   *stateDir
	route   route
	// isolation is what holds the process itself, required what the operator insists on.
	isolation []runner.Feature
	required  []string
	ahead     *ahead
	// private are paths of this runner's own and those of Options.DeniedPaths.
	private deniedPaths

	stop    context.CancelFunc
	stopped sync.WaitGroup

	// engine is known once a job has run; probing is held while it is found out.
	engine  atomic.Pointer[engine]
	probing sync.Mutex

	// vetted are the IDs of images whose files of accounts were looked at. They are forgotten
	// with each look for leftovers.
	vetted sync.Map

	// cgroupsMissing and storageMissing are set once the engine has shown that it puts its
	// containers' groups elsewhere, or that its storage driver cannot bound a root.
	cgroupsMissing, storageMissing atomic.Bool
}

var (
	_ runner.JobRunner = (*Runner)(nil)
	_ runner.Drainer   = (*Runner)(nil)
)

// sweepInterval is how often leftovers are looked for.
const sweepInterval = time.Minute

// New makes a runner and begins to look for leftovers of crashed ones. It does not fail when
// no engine answers, unless the operator insists on features: jobs then fail with UNAVAILABLE
// until one does.
func New(o Options) (*Runner, error) {
	opts := []client.Opt{client.FromEnv, client.WithUserAgent("specql-docker-runner")}
	if o.Host != "" {
		opts = []client.Opt{client.WithHost(o.Host), client.WithUserAgent("specql-docker-runner"), client.WithTLSClientConfigFromEnv()}
	}
	cli, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("docker engine address: %w", err)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	private, err := newDeniedPaths("it holds the mesh's own data", o.DeniedPaths...)
	if err != nil {
		_ = cli.Close()
		return nil, err
	}
	if err := checkCeiling(o.Ceiling, private); err != nil {
		_ = cli.Close()
		return nil, err
	}
	who, err := newOwner()
	if err != nil {
		_ = cli.Close()
		return nil, err
	}
	r := &Runner{
		client: cli, ceiling: o.Ceiling, log: o.Logger, owner: who, state: newStateDir(o.StateDir, who), route: routeTo(cli.DaemonHost()),
		isolation: o.Isolation, required: o.RequireIsolation,
	}
	r.ahead = newAhead(r)
	state, err := newDeniedPaths("it holds the runner's own files", r.state.root)
	if err != nil {
		_ = cli.Close()
		return nil, err
	}
	engine, err := newDeniedPaths("it gives the container power over the engine", r.route.socket, os.Getenv(client.EnvOverrideCertPath), os.Getenv("DOCKER_CONFIG"))
	if err != nil {
		_ = cli.Close()
		return nil, err
	}
	r.private = append(append(private, state...), engine...)
	if err := r.allowed(); err != nil {
		r.log.Error("no job will run", slogError(err))
	} else if others := r.route.who(); others != "" {
		r.log.Warn("the engine is not this runner's alone", slog.String("reason", others))
	}
	if len(r.required) > 0 {
		if err := r.require(context.Background(), o.Host); err != nil {
			_ = cli.Close()
			return nil, errors.Join(err, r.state.remove())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	r.stopped.Go(func() { r.sweepForever(ctx) })
	return r, nil
}

// Close ends the search for leftovers and the connections to the engine. Call it once no job runs.
func (r *Runner) Close() {
	r.stop()
	r.stopped.Wait()
	r.ahead.close()
	r.ahead.work.Wait()
	if err := r.client.Close(); err != nil {
		r.log.Warn("close the connection to the engine", slog.Any("error", err))
	}
	if err := r.state.remove(); err != nil {
		r.log.Warn("remove the state directory", slog.Any("error", err))
	}
	releaseGroups(r.log)
}

// allowed says whether the engine may be used at its address: nil, or an UNAVAILABLE error.
func (r *Runner) allowed() error {
	if r.route.refused == "" {
		return nil
	}
	return fault.New(fault.Unavailable, "%s", r.route.refused)
}

// Ping says whether an engine answers: nil, or an UNAVAILABLE error with the mend.
func (r *Runner) Ping(ctx context.Context) error {
	if err := r.allowed(); err != nil {
		return err
	}
	if _, err := r.client.Ping(ctx, client.PingOptions{}); err != nil {
		f := engineFault(err, "reach the Docker engine")
		if f.Code != fault.Unavailable {
			f = unavailable(err)
		}
		return f
	}
	return nil
}

// Describe implements [runner.JobRunner].
func (r *Runner) Describe(ctx context.Context) (*runner.Description, error) {
	return &runner.Description{
		Name:      "docker-runner",
		Types:     []runner.Type{DescribeType()},
		Isolation: r.features(ctx),
	}, nil
}

type schemaSet struct{ config, policy, operation []byte }

var schemas = sync.OnceValue(func() schemaSet {
	return schemaSet{
		config:    runner.SchemaOf[Config](),
		policy:    runner.SchemaOf[Policy](),
		operation: runner.SchemaOf[Operation](),
	}
})

// Validate implements [runner.JobRunner]. It needs no engine.
func (r *Runner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	return checkService(s, r.ceiling, r.denied()), nil
}

// denied are the paths of this host that no container gets. What belongs to the engine is
// among them once it is known.
func (r *Runner) denied() deniedPaths {
	e := r.engine.Load()
	if e == nil || !path.IsAbs(e.info.DockerRootDir) {
		return r.private
	}
	return append(slices.Clone(r.private), deniedPath{path: path.Clean(e.info.DockerRootDir), why: "it belongs to the engine"})
}

// foresee warns of what the policies would forbid at run time, as far as names tell.
func foresee(cfg *Config, policy, ceiling *Policy, denied deniedPaths) []runner.Problem {
	var found []runner.Problem
	warn := func(path, mend string, err error) {
		if f, ok := fault.As(err); ok && f.Code == fault.PolicyViolation {
			found = append(found, runner.Problem{Path: path, Message: f.Message, Mend: mend, Warning: true})
		}
	}
	p := newPolicies(*policy, ceiling, denied, &runner.Checks{})
	if name, err := parseImage(cfg.Image); err == nil && cfg.Image != "" {
		warn("runner_config.image", fmt.Sprintf("add %q to security_policy.allowed_images", cfg.Image), p.imageName(name))
	}
	if forbiddenNetwork(cfg.NetworkMode) == "" {
		warn("runner_config.network_mode", fmt.Sprintf("add %q to security_policy.allowed_networks", cfg.network()), p.network(cfg.network()))
	}
	for i, v := range cfg.Volumes {
		if denied.why(path.Clean(v.HostPath)) != "" || !path.IsAbs(v.HostPath) {
			continue // an error, not a warning
		}
		if _, err := p.volume(v, byName); err != nil {
			warn(fmt.Sprintf("runner_config.volumes[%d]", i), "list the path in security_policy.volume_restrictions.allowed_host_paths", err)
		}
	}
	warn("runner_config.volumes", "raise security_policy.volume_restrictions.max_volumes", p.volumeCount(len(cfg.Volumes)))
	if auth := cfg.RegistryAuth; auth != nil {
		for _, key := range []struct{ at, name string }{{"username_env_var", auth.UsernameEnvVar}, {"password_env_var", auth.PasswordEnvVar}} {
			if !runner.OwnVariable(key.name) {
				warn("runner_config.registry_auth."+key.at, fmt.Sprintf("add %q to allowed_env_vars", key.name), p.envVar(key.name))
			}
		}
	}
	return found
}

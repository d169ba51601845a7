// Package kubernetes carries out calls of docker services as Jobs of a Kubernetes cluster: one Job
// for each call, in a namespace that holds nothing else, whose pods get no token, no privilege and
// no volume of the host. A Job is named by its call, so that a runner that begins anew, or another
// one, goes on with it where the first was. What nobody goes on with is found by its label and removed.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
)

// Options of a [Runner].
type Options struct {
	// Config says where the cluster's API is and as whom it is asked.
	Config *rest.Config
	// Namespace of the Jobs. Everything in it with the runner's label is the runner's.
	Namespace string
	// ShimImage holds the shim as /shim, commonly the runner's own image.
	ShimImage string
	// ServiceAccount of the Jobs' pods, which get no token of it; default if empty.
	ServiceAccount string
	// PullSecrets are names of Secrets there with the credentials of registries.
	PullSecrets []string
	// Pod is what every pod gets besides: where it runs, and by which runtime.
	Pod Placement
	// Ceiling is the operator's policy, checked besides the registry's. Nil: none.
	Ceiling *dockerrunner.Policy
	// Logger; nil discards.
	Logger *slog.Logger
	// Isolation is what holds the process itself, besides what holds its Jobs.
	Isolation []runner.Feature
	// RequireIsolation names features without which New fails; all for every one.
	RequireIsolation []string
}

// Placement says where pods run, and by which runtime.
type Placement struct {
	NodeSelector     map[string]string   `json:"nodeSelector,omitempty"`
	Tolerations      []corev1.Toleration `json:"tolerations,omitempty"`
	RuntimeClassName string              `json:"runtimeClassName,omitempty"`
}

// Runner is a [runner.JobRunner] on a Kubernetes cluster. Make it with [New].
type Runner struct {
	o        Options
	log      *slog.Logger
	api      *api
	instance string

	pods     cache.SharedIndexInformer
	watchers watchers

	stop    context.CancelFunc
	stopped sync.WaitGroup
}

var (
	_ runner.JobRunner = (*Runner)(nil)
	_ runner.Checker   = (*Runner)(nil)
)

var nameOfNamespace = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// New makes a runner and begins to look for leftovers. It does not fail where no API server
// answers: jobs then fail with UNAVAILABLE until one does.
func New(o Options) (*Runner, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if !nameOfNamespace.MatchString(o.Namespace) {
		return nil, fmt.Errorf("%q is not the name of a namespace; give the one that the Jobs are to be made in (--kube-namespace)", o.Namespace)
	}
	if o.ShimImage == "" {
		return nil, errors.New("no image holds the shim; give the runner's own (--kube-shim-image)")
	}
	if err := dockerrunner.CheckCeiling(o.Ceiling); err != nil {
		return nil, fmt.Errorf("check the ceiling: %w", err)
	}
	api, err := newAPI(o.Config, o.Namespace)
	if err != nil {
		return nil, err
	}
	r := &Runner{o: o, log: o.Logger, api: api, instance: newInstance()}
	if len(o.RequireIsolation) > 0 {
		if err := runner.Require(r.features(), o.RequireIsolation); err != nil {
			return nil, fmt.Errorf("what the operator insists on: %w", err)
		}
	}
	if r.pods, err = r.newInformer(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	r.stopped.Go(func() { r.pods.RunWithContext(ctx) })
	r.stopped.Go(func() { r.live(ctx) })
	return r, nil
}

// Close ends the watches. Call it once no job runs. Jobs that were handed back go on; whoever they
// are handed to goes on with them, and other runners remove them where nobody does.
func (r *Runner) Close() {
	r.stop()
	r.stopped.Wait()
	net.CloseIdleConnectionsFor(r.api.http.Transport)
}

// Ping says whether the API server answers, and lets the runner see its Jobs: nil, or an
// UNAVAILABLE error with the mend.
func (r *Runner) Ping(ctx context.Context) error {
	_, err := r.api.jobs.List(ctx, listOne)
	return r.api.fault(err, "list Jobs")
}

// Describe implements [runner.JobRunner].
func (r *Runner) Describe(ctx context.Context) (*runner.Description, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	features := r.features()
	cluster := runner.Feature{Name: "kubernetes_api", Available: true}
	if err := r.Ping(ctx); err != nil {
		cluster.Available, cluster.Detail = false, fault.From(err).Message
	}
	return &runner.Description{Name: "docker-runner", Types: []runner.Type{dockerrunner.DescribeType()}, Isolation: append([]runner.Feature{cluster}, features...)}, nil
}

// features are what holds every Job.
func (r *Runner) features() []runner.Feature {
	var features []runner.Feature
	for _, name := range []string{"capabilities_dropped", "no_new_privileges", "private_namespaces", "read_only_root", "seccomp", "run_as_non_root", "memory_limit", "cpu_limit", "cgroup"} {
		features = append(features, runner.Feature{Name: name, Available: true})
	}
	kernel := runner.Feature{Name: "own_kernel", Available: r.o.Pod.RuntimeClassName != ""}
	if !kernel.Available {
		kernel.Detail = "pods share their node's kernel; name a RuntimeClass of a sandbox such as gVisor or Kata (runtimeClassName of --kube-pod)"
	}
	return append(append(features, kernel), r.o.Isolation...)
}

// Validate implements [runner.JobRunner]. It needs no cluster.
func (r *Runner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	found := dockerrunner.Validate(s, r.o.Ceiling)
	cfg := runner.Lenient[dockerrunner.Config](s.Config)
	return runner.AppendProblems(found, unsupported(&cfg)...), nil
}

// unsupported is what a service asks for that a cluster has no meaning for.
func unsupported(cfg *dockerrunner.Config) []runner.Problem {
	var found []runner.Problem
	add := func(path, mend, format string, args ...any) {
		found = append(found, runner.Problem{Path: "runner_config." + path, Message: fmt.Sprintf(format, args...), Mend: mend})
	}
	if len(cfg.Volumes) > 0 {
		add("volumes", "pass data by the input, or by the network", "there is no one host on a Kubernetes cluster whose files could be mounted")
	}
	switch cfg.NetworkMode {
	case "", dockerrunner.NetworkNone, dockerrunner.NetworkBridge, "default":
	default:
		add("network_mode", "use none or bridge", "%.100q is a network of a Docker engine; on a Kubernetes cluster there are none and bridge", cfg.NetworkMode)
	}
	if _, _, err := numericUser(cfg.User); err != nil {
		add("user", "write uid or uid:gid in digits, not 0", "%v", err)
	}
	if strings.HasPrefix(cfg.Image, "sha256:") || bareID.MatchString(cfg.Image) {
		add("image", "name it by a tag or a digest", "an image ID is known on one engine alone")
	}
	if cfg.CreatedAhead != 0 {
		add("created_ahead", "leave it out", "a cluster runs what it creates: nothing can be created ahead on it")
	}
	return found
}

var bareID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Check implements [runner.Checker]. It needs no cluster.
func (r *Runner) Check(_ context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	checks := &runner.Checks{}
	res := &runner.CheckResult{}
	p, err := dockerrunner.Prepare(&job.Job, r.o.Ceiling, checks)
	if err == nil {
		_, err = p.Pinned()
	}
	if err == nil {
		limit := runner.RecordedLimit{Key: "resource_limits.memory_mb", Unit: "MiB", Service: p.Limits.MemoryMB, Used: job.Usage.PeakMemoryMb} //nolint:protogetter // absent is not zero
		var unknown string
		if err, unknown = limit.Check(checks, job); unknown != "" {
			res.Unknown = append(res.Unknown, unknown)
		}
	}
	if f, ok := fault.As(err); ok && f.Code == fault.Validation {
		res.Unknown = append(res.Unknown, "the Job cannot be made as it was then: "+f.Message)
		err = nil
	}
	res.Err, res.Checks = err, checks.Context("").GetChecks()
	return res, nil
}

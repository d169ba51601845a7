package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/schema"
	"github.com/specql/mesh/services/orchestrator/server"
	"github.com/specql/mesh/test/pgtest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// echoRunner serves the type "echo": operations answer with their input.
type echoRunner struct {
	mu      sync.Mutex
	jobs    []runner.Job
	arrived chan *runner.Job
	release chan struct{} // what "hold" waits for
	ended   atomic.Int32
}

type (
	echoConfig struct {
		Greeting string `json:"greeting,omitempty"`
	}
	echoOperation struct {
		Fail string `json:"fail,omitempty"`
	}
	echoPolicy struct {
		AllowedThings []string `json:"allowed_things,omitempty"`
	}
)

// Describe implements runner.JobRunner.
func (*echoRunner) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "echo-runner", Types: []runner.Type{{
		Name: "echo", ConfigSchema: runner.SchemaOf[echoConfig](), PolicySchema: runner.SchemaOf[echoPolicy](), OperationSchema: runner.SchemaOf[echoOperation](),
		DefaultMaxRetries: 2,
	}}}, nil
}

// Validate implements runner.JobRunner.
func (*echoRunner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	return runner.CheckService[echoConfig, echoOperation, echoPolicy](s), nil
}

// Execute implements runner.JobRunner.
func (r *echoRunner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	defer r.ended.Add(1)
	r.mu.Lock()
	r.jobs = append(r.jobs, *job)
	r.mu.Unlock()
	r.arrived <- job
	sink.Log("stdout", "hello from "+job.Operation.Name)
	switch job.Operation.Name {
	case "hold":
		select {
		case <-r.release:
		case <-ctx.Done():
			return &runner.Result{}, nil
		}
	case "charge":
		return &runner.Result{Output: job.Input, Usage: &runnerv1.ResourceUsage{CostUsd: new(0.25)}}, nil
	case "flaky":
		if job.Attempt == 1 {
			return &runner.Result{Err: fault.New(fault.Unavailable, "not yet")}, nil
		}
	case "refuse":
		return &runner.Result{Err: fault.New(fault.RemoteError, "no")}, nil
	}
	if job.Operation.Name == "deny" {
		var checks runner.Checks
		err := checks.Deny("allowed_things", "thing b", "it is not listed", runner.AddTo(false, "allowed_things", "b"))
		_ = checks.Deny("ceiling.allowed_things", "thing b", "nor there", runner.AddTo(true, "allowed_things", "b"))
		return &runner.Result{Err: err, Security: checks.Context("digest")}, nil
	}
	return &runner.Result{Output: job.Input}, nil
}

func (r *echoRunner) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.jobs)
}

const echoRegistry = `
services:
  - name: svc
    type: t
    category: c
    execution_type: echo
    runner_config: {greeting: hi}
    operations:
      - {name: say, input_schema: {n: "integer?"}}
      - {name: hold}
      - {name: refuse}
`

const echoEntity = `
entity: thing
fields: {label: {type: string, required: true}, state: {type: string, default: new}}
actions:
  make:
    input: {n: {type: integer, default: 3}}
    preconditions: ["state == 'new'"]
    steps:
      - call_service: {service: svc, operation: say, input: {n: "$n"}}
      - update: {set: {state: made}}
    output: {n: "$say.n", state: "$thing.state"}
`

type system struct {
	t      testing.TB
	runner *echoRunner
	addr   string
	web    string

	metrics string
	conn    *grpc.ClientConn
	o       specqlv1.OrchestratorServiceClient
	r       specqlv1.RegistryServiceClient
	stop    func()
}

func start(t testing.TB, data string, options ...func(*server.Options)) *system {
	t.Helper()
	return startWith(t, data, runner.Options{MaxConcurrency: 2, DrainTimeout: time.Millisecond}, options...)
}

func startWith(t testing.TB, data string, r runner.Options, options ...func(*server.Options)) *system {
	t.Helper()
	s := &system{t: t, runner: &echoRunner{arrived: make(chan *runner.Job, 10_000), release: make(chan struct{})}}
	ca, err := mesh.NewAuthority()
	require.NoError(t, err)
	runnerTLS, err := ca.Issue("echo-runner", "127.0.0.1")
	require.NoError(t, err)
	orchestratorTLS, err := ca.Issue(mesh.RoleOrchestrator, "127.0.0.1")
	require.NoError(t, err)
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		return l
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	runnerLis, apiLis, webLis, metricsLis := listen(), listen(), listen(), listen()
	s.addr, s.web, s.metrics = apiLis.Addr().String(), webLis.Addr().String(), metricsLis.Addr().String()
	rctx, rcancel := context.WithCancel(context.Background())
	wg.Go(func() {
		if err := runner.Serve(rctx, runnerLis, s.runner, runnerTLS, r); err != nil {
			t.Error(err)
		}
	})
	ready := make(chan struct{})
	o := server.Options{
		Listener: apiLis, Console: webLis, Metrics: metricsLis, Database: "sqlite:" + filepath.Join(data, "specql.db"),
		Registry: &spec.File{Name: "registry.yaml", Content: []byte(echoRegistry)},
		Entities: []spec.File{{Name: "thing.yaml", Content: []byte(echoEntity)}},
		Runners:  map[string]string{"echo": runnerLis.Addr().String()}, RunnerCredentials: orchestratorTLS,
		DrainTimeout: time.Millisecond, Logger: slog.New(slog.DiscardHandler), Ready: func(server.Addresses) { close(ready) },
	}
	for _, option := range options {
		option(&o)
	}
	failed := make(chan error, 1)
	wg.Go(func() { failed <- server.Run(ctx, o) })
	select {
	case <-ready:
	case err := <-failed:
		t.Fatal(err)
	}
	s.conn, err = grpc.NewClient(s.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	s.o, s.r = specqlv1.NewOrchestratorServiceClient(s.conn), specqlv1.NewRegistryServiceClient(s.conn)
	s.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, s.conn.Close())
		require.NoError(t, <-failed)
		rcancel()
		wg.Wait()
		http.DefaultClient.CloseIdleConnections()
	})
	t.Cleanup(s.stop)
	return s
}

func workflow(operation string) string {
	return fmt.Sprintf("actions:\n  - call_service: {service: svc, operation: %s, input: $input}\n", operation)
}

func (s *system) execute(req *specqlv1.ExecuteActionRequest) *specqlv1.Run {
	s.t.Helper()
	resp, err := s.o.ExecuteAction(s.t.Context(), req)
	require.NoError(s.t, err)
	return resp.GetRun()
}

func object(t *testing.T, text string) *structpb.Struct {
	t.Helper()
	out := &structpb.Struct{}
	require.NoError(t, out.UnmarshalJSON([]byte(text)))
	return out
}

func TestExecuteAndWait(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	run := s.execute(&specqlv1.ExecuteActionRequest{
		Entity: "Thing", Action: "make", Input: object(t, `{"label":"a"}`), Wait: durationpb.New(time.Minute), IdempotencyKey: "k", CorrelationId: "c",
	})
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus(), "%v", run.GetError())
	require.Equal(t, map[string]any{"n": 3.0, "state": "made"}, run.GetOutput().GetStructValue().AsMap())
	require.NotEmpty(t, run.GetEntityId())
	require.Len(t, run.GetJobs(), 1)
	job := run.GetJobs()[0]
	require.Equal(t, "echo", job.GetExecutionType())
	require.EqualValues(t, 1, job.GetAttempts())
	require.Equal(t, int32(3), job.GetMaxAttempts(), "the runner's own default")
	require.Positive(t, job.GetResourceUsage().GetDurationSeconds())
	require.NotEmpty(t, job.GetSecurityContext().GetRunner())
	require.Equal(t, job.GetId(), job.GetIdempotencyKey())

	again := s.execute(&specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", Input: object(t, `{"label":"b"}`), IdempotencyKey: "k"})
	require.Equal(t, run.GetId(), again.GetId())
	require.Equal(t, 1, s.runner.count())

	// The row's state is remembered: the same action does not fit it any more.
	second := s.execute(&specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", EntityId: run.GetEntityId(), Wait: durationpb.New(time.Minute)})
	require.Equal(t, specqlv1.Status_STATUS_FAILED, second.GetStatus())
	require.Equal(t, "VALIDATION", second.GetError().GetCode())
}

// A start that is repeated is answered with the first one's run: from memory, by the database, and also once what it
// asks for is not valid any more.
func TestARepeatedStartIsTheFirstOne(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	s := start(t, data)
	req := &specqlv1.ExecuteActionRequest{Workflow: workflow("say"), Wait: durationpb.New(time.Minute), IdempotencyKey: "k"}
	first := s.execute(req)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, first.GetStatus())
	require.Equal(t, first.GetId(), s.execute(req).GetId(), "from memory")
	other := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("say"), IdempotencyKey: "another"})
	require.NotEqual(t, first.GetId(), other.GetId())
	s.stop()
	s = start(t, data)
	require.Equal(t, first.GetId(), s.execute(req).GetId(), "the database refuses the second one")
	s.stop()
	s = start(t, data, func(o *server.Options) {
		o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(strings.ReplaceAll(echoRegistry, "say", "tell"))}
		o.Entities = nil
	})
	again := s.execute(req)
	require.Equal(t, first.GetId(), again.GetId(), "its operation is gone")
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, again.GetStatus())
	_, err := s.o.ExecuteAction(t.Context(), &specqlv1.ExecuteActionRequest{Workflow: workflow("say"), IdempotencyKey: "new"})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
}

func TestBadRequestsNameTheirFields(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	long := make([]byte, 300)
	for i := range long {
		long[i] = 'x'
	}
	cases := []struct {
		name  string
		req   *specqlv1.ExecuteActionRequest
		code  codes.Code
		field string
	}{
		{"nothing", &specqlv1.ExecuteActionRequest{}, codes.InvalidArgument, "entity"},
		{"no action", &specqlv1.ExecuteActionRequest{Entity: "thing"}, codes.InvalidArgument, "action"},
		{"both", &specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", Workflow: workflow("say")}, codes.InvalidArgument, "workflow"},
		{"negative wait", &specqlv1.ExecuteActionRequest{Workflow: workflow("say"), Wait: durationpb.New(-1)}, codes.InvalidArgument, "wait"},
		{"long key", &specqlv1.ExecuteActionRequest{Workflow: workflow("say"), IdempotencyKey: string(long)}, codes.InvalidArgument, "idempotency_key"},
		{"unknown entity", &specqlv1.ExecuteActionRequest{Entity: "thin", Action: "make"}, codes.NotFound, ""},
		{"unknown action", &specqlv1.ExecuteActionRequest{Entity: "thing", Action: "mak"}, codes.NotFound, ""},
		{"unknown row", &specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", EntityId: "1c7e0000-0000-7000-8000-000000000001"}, codes.NotFound, ""},
		{"a row that lacks a field", &specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make"}, codes.InvalidArgument, "input.label"},
		{"wrong type", &specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", Input: object(t, `{"label":"a","n":"x"}`)}, codes.InvalidArgument, "input.n"},
		{"no YAML", &specqlv1.ExecuteActionRequest{Workflow: "a: [b"}, codes.InvalidArgument, "workflow"},
		{"unknown service", &specqlv1.ExecuteActionRequest{Workflow: "actions: [{call_service: {service: no, operation: no}}]"}, codes.InvalidArgument, "workflow"},
		{"unknown name", &specqlv1.ExecuteActionRequest{Workflow: "actions: [{call_service: {service: svc, operation: say, input: {n: $nope.x}}}]"}, codes.InvalidArgument, "input"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.o.ExecuteAction(t.Context(), c.req)
			require.Equal(t, c.code, status.Code(err), "%v", err)
			var fields []string
			for _, d := range status.Convert(err).Details() {
				if bad, ok := d.(*errdetails.BadRequest); ok {
					for _, v := range bad.GetFieldViolations() {
						fields = append(fields, v.GetField())
					}
				}
			}
			if c.field != "" {
				require.Contains(t, fields, c.field)
			}
		})
	}
	for _, id := range []string{"", "nope"} {
		_, err := s.o.GetRun(t.Context(), &specqlv1.GetRunRequest{Id: id})
		require.Contains(t, []codes.Code{codes.InvalidArgument, codes.NotFound}, status.Code(err))
		stream, err := s.o.WatchRun(t.Context(), &specqlv1.WatchRunRequest{Id: id})
		require.NoError(t, err)
		_, err = stream.Recv()
		require.Contains(t, []codes.Code{codes.InvalidArgument, codes.NotFound}, status.Code(err))
	}
	// A list of millions would be the database's to look through.
	for _, statuses := range [][]specqlv1.Status{{99}, {specqlv1.Status_STATUS_UNSPECIFIED}, make([]specqlv1.Status, 1000), slices.Repeat([]specqlv1.Status{specqlv1.Status_STATUS_FAILED}, 1000)} {
		_, err := s.o.ListRuns(t.Context(), &specqlv1.ListRunsRequest{Statuses: statuses})
		require.Equal(t, codes.InvalidArgument, status.Code(err))
		require.Len(t, fault.FromError(err).Violations, 1)
		require.Equal(t, "statuses", fault.FromError(err).Violations[0].Field)
	}
	require.Zero(t, s.runner.count())
}

func TestCancelListAndRetry(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("hold")})
	<-s.runner.arrived
	cancelled, err := s.o.CancelRun(t.Context(), &specqlv1.CancelRunRequest{Id: run.GetId(), Reason: "enough"})
	require.NoError(t, err)
	require.EqualValues(t, 1, s.runner.ended.Load(), "the job has ended before the run")
	require.Equal(t, specqlv1.Status_STATUS_CANCELLED, cancelled.GetRun().GetStatus())
	require.Contains(t, cancelled.GetRun().GetError().GetMessage(), "enough")
	require.Equal(t, specqlv1.Status_STATUS_CANCELLED, cancelled.GetRun().GetJobs()[0].GetStatus())
	_, err = s.o.CancelRun(t.Context(), &specqlv1.CancelRunRequest{Id: run.GetId()})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))

	list, err := s.o.ListRuns(t.Context(), &specqlv1.ListRunsRequest{Statuses: []specqlv1.Status{specqlv1.Status_STATUS_CANCELLED}})
	require.NoError(t, err)
	require.Len(t, list.GetRuns(), 1)

	close(s.runner.release)
	retried, err := s.o.RetryRun(t.Context(), &specqlv1.RetryRunRequest{Id: run.GetId()})
	require.NoError(t, err)
	require.EqualValues(t, 1, retried.GetRun().GetRetries())
	final := watch(t, s, run.GetId(), 0, nil)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, final.GetStatus())
	_, err = s.o.RetryRun(t.Context(), &specqlv1.RetryRunRequest{Id: run.GetId()})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	_, err = s.o.SignalRun(t.Context(), &specqlv1.SignalRunRequest{Id: run.GetId(), Name: "x"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
}

// watch follows a run to its end and returns its last state.
func watch(t *testing.T, s *system, id string, after int64, each func(*specqlv1.WatchRunResponse)) *specqlv1.Run {
	t.Helper()
	stream, err := s.o.WatchRun(t.Context(), &specqlv1.WatchRunRequest{Id: id, AfterSequence: after, Logs: true})
	require.NoError(t, err)
	var last *specqlv1.Run
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return last
		}
		require.NoError(t, err)
		if each != nil {
			each(m)
		}
		if m.GetRun() != nil {
			last = m.GetRun()
		}
	}
}

func TestWatchShowsSignalsAndLogs(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: "actions:\n  - call_service: {service: svc, operation: say}\n  - await_signal: {name: go}\n  - call_service: {service: svc, operation: say, input: {n: $go.n}, as: last}\noutput: {n: $last.n}\n"})
	var lines []string
	signalled := false
	final := watch(t, s, run.GetId(), 0, func(m *specqlv1.WatchRunResponse) {
		if m.GetLog() != nil {
			lines = append(lines, m.GetLog().GetText())
		}
		if !signalled && len(m.GetRun().GetWaiting()) == 1 {
			signalled = true
			require.Equal(t, "go", m.GetRun().GetWaiting()[0].GetSignal())
			_, err := s.o.SignalRun(t.Context(), &specqlv1.SignalRunRequest{Id: run.GetId(), Name: "go", Payload: structpb.NewStructValue(object(t, `{"n":4}`))})
			require.NoError(t, err)
		}
	})
	require.True(t, signalled)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, final.GetStatus(), "%v", final.GetError())
	require.Equal(t, map[string]any{"n": 4.0}, final.GetOutput().GetStructValue().AsMap())
	require.Equal(t, []string{"hello from say", "hello from say"}, lines)
	// An ended run is watched the same way.
	var again []string
	watch(t, s, run.GetId(), 0, func(m *specqlv1.WatchRunResponse) {
		if m.GetLog() != nil {
			again = append(again, m.GetLog().GetText())
		}
	})
	require.Equal(t, lines, again)
}

func TestAFullRunnerCountsNoAttempt(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	ids := make([]string, 0, 6)
	for range 6 {
		ids = append(ids, s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("hold")}).GetId())
	}
	<-s.runner.arrived
	<-s.runner.arrived // two places, six jobs
	close(s.runner.release)
	for _, id := range ids {
		require.Equal(t, specqlv1.Status_STATUS_COMPLETED, watch(t, s, id, 0, nil).GetStatus())
		got, err := s.o.GetRun(t.Context(), &specqlv1.GetRunRequest{Id: id})
		require.NoError(t, err)
		require.EqualValues(t, 1, got.GetRun().GetJobs()[0].GetAttempts())
	}
}

func TestRestartGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	s := start(t, data)
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: "actions:\n  - call_service: {service: svc, operation: say, input: {n: 1}}\n  - call_service: {service: svc, operation: hold, input: {n: $say.n}}\n"})
	first := <-s.runner.arrived
	held := <-s.runner.arrived
	require.Equal(t, "say", first.Operation.Name)
	s.stop()

	s = start(t, data, func(o *server.Options) { o.Registry, o.Entities = nil, nil })
	close(s.runner.release)
	final := watch(t, s, run.GetId(), 0, nil)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, final.GetStatus(), "%v", final.GetError())
	require.Equal(t, 1, s.runner.count(), "what had completed is not called again")
	repeated := <-s.runner.arrived
	require.Equal(t, held.IdempotencyKey, repeated.IdempotencyKey)
	reg, err := s.r.GetRegistry(t.Context(), &specqlv1.GetRegistryRequest{})
	require.NoError(t, err)
	require.Len(t, reg.GetServices(), 1, "the registry in force is the one of before")
}

func TestApplyRegistry(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir())
	before, err := s.r.GetRegistry(t.Context(), &specqlv1.GetRegistryRequest{})
	require.NoError(t, err)
	require.NotEmpty(t, before.GetDigest())
	bad := []byte("services:\n  - name: svc\n    type: t\n    category: c\n    execution_type: echo\n    runner_config: {greetign: hi}\n    operations: [{name: say, fial: x}]\n")
	resp, err := s.r.ApplyRegistry(t.Context(), &specqlv1.ApplyRegistryRequest{Registry: &specqlv1.Document{Name: "r.yaml", Content: bad}})
	require.NoError(t, err)
	require.False(t, resp.GetApplied())
	require.Equal(t, before.GetDigest(), resp.GetDigest())
	require.Len(t, resp.GetProblems(), 2)
	require.EqualValues(t, 6, resp.GetProblems()[0].GetLine())
	require.EqualValues(t, 7, resp.GetProblems()[1].GetLine())

	good := []byte("services:\n  - {name: other, type: t, category: c, execution_type: echo, operations: [{name: say}]}\n")
	resp, err = s.r.ApplyRegistry(t.Context(), &specqlv1.ApplyRegistryRequest{Registry: &specqlv1.Document{Name: "r.yaml", Content: good}})
	require.NoError(t, err)
	require.True(t, resp.GetApplied(), "%v", resp.GetProblems())
	_, err = s.o.ExecuteAction(t.Context(), &specqlv1.ExecuteActionRequest{Workflow: workflow("say")})
	require.Equal(t, codes.InvalidArgument, status.Code(err))

	check, err := s.r.ValidateRegistry(t.Context(), &specqlv1.ValidateRegistryRequest{Entities: []*specqlv1.Document{{Name: "e.yaml", Content: []byte(echoEntity)}}})
	require.NoError(t, err)
	require.NotEmpty(t, check.GetProblems(), "the entity calls svc, which is gone")
}

func TestRunnersHealthReflectionAndConsole(t *testing.T) {
	t.Parallel()
	s := start(t, t.TempDir(), func(o *server.Options) { o.Runners["gone"] = "127.0.0.1:1" })
	runners, err := s.r.ListRunners(t.Context(), &specqlv1.ListRunnersRequest{})
	require.NoError(t, err)
	require.Len(t, runners.GetRunners(), 2)
	require.True(t, runners.GetRunners()[0].GetReachable())
	require.True(t, json.Valid(runners.GetRunners()[0].GetDescription().GetTypes()[0].GetConfigSchema()))
	require.False(t, runners.GetRunners()[1].GetReachable())
	require.NotEmpty(t, runners.GetRunners()[1].GetError())

	health, err := grpc_health_v1.NewHealthClient(s.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	require.NoError(t, err)
	require.Equal(t, grpc_health_v1.HealthCheckResponse_SERVING, health.GetStatus())

	reflect, err := grpc_reflection_v1.NewServerReflectionClient(s.conn).ServerReflectionInfo(t.Context())
	require.NoError(t, err)
	require.NoError(t, reflect.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}))
	names, err := reflect.Recv()
	require.NoError(t, err)
	var services []string
	for _, n := range names.GetListServicesResponse().GetService() {
		services = append(services, n.GetName())
	}
	require.Subset(t, services, []string{"specql.v1.OrchestratorService", "specql.v1.RegistryService"})
	require.NoError(t, reflect.CloseSend())

	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("say"), Wait: durationpb.New(time.Minute)})
	resp, err := http.Get("http://" + s.metrics + "/metrics")
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	for _, line := range []string{`specql_runs_ended_total{status="completed"} 1`, `specql_job_duration_seconds_count{execution_type="echo",status="completed"} 1`, "specql_journal_commit_records_count"} {
		require.Contains(t, string(body), line)
	}
	rebound, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.web+"/", nil)
	require.NoError(t, err)
	rebound.Host = "attacker.example"
	refused, err := http.DefaultClient.Do(rebound)
	require.NoError(t, err)
	require.NoError(t, refused.Body.Close())
	require.Equal(t, http.StatusMisdirectedRequest, refused.StatusCode)
	for _, path := range []string{"/", "/runs/" + run.GetId()} {
		resp, err := http.Get("http://" + s.web + path)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.Contains(t, string(body), run.GetId())
		require.Contains(t, resp.Header.Get("Content-Security-Policy"), "default-src 'none'")
	}
}

func TestAnInvalidRegistryStopsTheStart(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	err = server.Run(t.Context(), server.Options{
		Listener: l, Database: "sqlite:" + filepath.Join(t.TempDir(), "x.db"), Registry: &spec.File{Name: "r.yaml", Content: []byte("services: 3")},
	})
	var invalid *server.InvalidError
	require.ErrorAs(t, err, &invalid)
	require.Equal(t, "r.yaml", invalid.Problems[0].File)
}

// PostgreSQL holds no NUL. Who is told to ask again would do so for ever.
func TestNULIsRefused(t *testing.T) {
	t.Parallel()
	for name, database := range map[string]func(*server.Options){
		"sqlite": func(*server.Options) {}, "postgres": func(o *server.Options) {
			o.Database = pgtest.Database(t)
			_, err := schema.Migrate(t.Context(), o.Database, nil)
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, t.TempDir(), database)
			waiting := "actions:\n  - await_signal: {name: go, timeout: 3600}\n"
			with := strings.Replace(workflow("say"), "actions:", "input: {x: any}\nactions:", 1)
			refused := func(field string, err error) {
				t.Helper()
				require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
				f := fault.FromError(err)
				require.Len(t, f.Violations, 1)
				require.Equal(t, fault.Violation{Field: field, Description: "holds the character U+0000, which is not kept"}, f.Violations[0])
			}
			for field, req := range map[string]*specqlv1.ExecuteActionRequest{
				"idempotency_key": {Workflow: waiting, IdempotencyKey: "a\x00b"},
				"correlation_id":  {Workflow: waiting, CorrelationId: "\x00"},
				"entity_id":       {Entity: "thing", Action: "say", EntityId: "\x00"},
				"input.x":         {Workflow: with, Input: object(t, `{"x": "a\u0000b"}`)},
				"input.x.y[1]":    {Workflow: with, Input: object(t, `{"x": {"y": ["", "\u0000"]}}`)},
				"input":           {Workflow: with, Input: object(t, `{"x": 1, "a\u0000": 1}`)},
			} {
				_, err := s.o.ExecuteAction(t.Context(), req)
				refused(field, err)
			}
			// What only looks like one passes.
			run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: with, Input: object(t, `{"x": "\\u0000"}`), Wait: durationpb.New(time.Minute)})
			require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus())
			// A workflow that makes one has a call that fails, as any other may.
			run = s.execute(&specqlv1.ExecuteActionRequest{Wait: durationpb.New(time.Minute), Workflow: "actions:\n" +
				"  - call_service: {service: svc, operation: say, input: {x: \"${ 'a\\\\u0000b' }\"}, on_failure: [{call_service: {service: svc, operation: say, input: {x: $error.code}}}]}\n"})
			require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus(), "%v", run.GetError())
			require.Equal(t, string(fault.Validation), run.GetJobs()[0].GetError().GetCode())
			id := s.execute(&specqlv1.ExecuteActionRequest{Workflow: waiting}).GetId()
			_, err := s.o.SignalRun(t.Context(), &specqlv1.SignalRunRequest{Id: id, Name: "\x00"})
			refused("name", err)
			_, err = s.o.SignalRun(t.Context(), &specqlv1.SignalRunRequest{Id: id, Name: "go", Payload: structpb.NewStringValue("\x00")})
			refused("payload", err)
			_, err = s.o.CancelRun(t.Context(), &specqlv1.CancelRunRequest{Id: id, Reason: "\x00"})
			refused("reason", err)
			_, err = specqlv1.NewInsightServiceClient(s.conn).ReplayPolicy(t.Context(), &specqlv1.ReplayPolicyRequest{Filter: &specqlv1.JobFilter{Service: "svc"}, PageToken: "x"})
			require.Equal(t, codes.InvalidArgument, status.Code(err))
		})
	}
}

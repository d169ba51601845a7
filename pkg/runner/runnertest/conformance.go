package runnertest

import (
	"encoding/json"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// promptly is how long a cancelled job may take to end where [Cases] do not say.
const promptly = 2 * time.Second

// Cases are the jobs that [Conformance] runs. Their ids are replaced.
type Cases struct {
	// Good is a job that succeeds.
	Good *runnerv1.Job
	// Check looks at the outcome of Good; may be nil.
	Check func(t *testing.T, o *Outcome)
	// Slow is a job that runs for at least a minute unless it is ended.
	Slow *runnerv1.Job
	// SlowLine is a log line that Slow writes once it is well under way; empty if it writes none.
	SlowLine string
	// Gone fails the test if anything that Slow started is still there; may be nil.
	Gone func(t *testing.T)
	// HandedOver is called after a drain and before Gone, for a runner whose jobs then go on where they are until another
	// replica takes them up: it checks that this one does, and ends it. May be nil.
	HandedOver func(t *testing.T)
	// Big is a job with an output of more than runner.MaxOutputBytes; nil skips that case.
	Big *runnerv1.Job
	// BigCodes are the error codes that Big may end with; RESOURCE_EXCEEDED and VALIDATION if empty.
	BigCodes []fault.Code
	// Promptly is how long a cancelled job may take to end; 2 s if zero.
	Promptly time.Duration
}

// Conformance checks that a runner keeps the promises of the RunnerService. The runner
// serves several servers one after another; its own Close is the caller's.
func Conformance(t *testing.T, jr runner.JobRunner, c Cases) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	s := &suite{jr: jr, c: c}
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"describe", s.describe},
		{"validate", s.validate},
		{"execute", s.execute},
		{"unknown execution type", s.unknownType},
		{"cancel", s.cancel},
		{"timeout", s.timeout},
		{"caller gone", s.callerGone},
		{"big output", s.bigOutput},
		{"full", s.full},
		{"duplicate", s.duplicate},
		{"lease", s.lease},
		{"drain", s.drain},
	} {
		if !t.Run(part.name, part.run) && part.name == "execute" {
			return // the rest would fail for the same reason
		}
	}
	t.Run("goroutines gone", func(t *testing.T) { goleak.VerifyNone(t, before) })
}

type suite struct {
	jr runner.JobRunner
	c  Cases
	n  int
}

// job is a copy with an id of its own.
func (s *suite) job(of *runnerv1.Job) *runnerv1.Job {
	s.n++
	job := proto.CloneOf(of)
	job.Id = "conformance-" + strconv.Itoa(s.n)
	if job.GetIdempotencyKey() == "" {
		job.IdempotencyKey = job.GetId()
	}
	job.Attempt = max(1, job.GetAttempt())
	return job
}

func (s *suite) describe(t *testing.T) {
	client := Start(t, s.jr, runner.Options{MaxConcurrency: 7, Version: "v1.2.3"})
	d, err := client.Describe(t.Context(), &runnerv1.DescribeRequest{})
	require.NoError(t, err)
	require.NotEmpty(t, d.GetName())
	require.Equal(t, "v1.2.3", d.GetVersion())
	require.EqualValues(t, 7, d.GetCapacity())
	require.Zero(t, d.GetInFlight())
	require.NotEmpty(t, d.GetTypes())
	require.True(t, slices.ContainsFunc(d.GetTypes(), func(e *runnerv1.ExecutionType) bool {
		return e.GetName() == s.c.Good.GetService().GetExecutionType()
	}), "the type of the good job is served")
	for _, e := range d.GetTypes() {
		require.NotEmpty(t, e.GetName())
		for name, schema := range map[string][]byte{"config": e.GetConfigSchema(), "policy": e.GetPolicySchema(), "operation": e.GetOperationSchema()} {
			var object map[string]any
			require.NoError(t, json.Unmarshal(schema, &object), "the %s schema of %s", name, e.GetName())
			// A key that cannot be known is found, by a schema that is valid itself.
			problems := runner.CheckSchema(schema, json.RawMessage(`{"no_such_key":1}`), "")
			require.True(t, slices.ContainsFunc(problems, func(p runner.Problem) bool { return p.Path == "no_such_key" }),
				"the %s schema of %s refuses unknown keys: %v", name, e.GetName(), problems)
		}
	}
	for _, f := range d.GetIsolation() {
		require.NotEmpty(t, f.GetName())
		require.True(t, f.GetAvailable() || f.GetDetail() != "", "%s says why it is not available", f.GetName())
	}
}

func (s *suite) validate(t *testing.T) {
	client := Start(t, s.jr)
	ask := func(service *runnerv1.Service, operation *runnerv1.Operation) []*runnerv1.Problem {
		resp, err := client.Validate(t.Context(), &runnerv1.ValidateRequest{Service: service, Operations: []*runnerv1.Operation{operation}})
		require.NoError(t, err)
		return slices.DeleteFunc(resp.GetProblems(), (*runnerv1.Problem).GetWarning)
	}
	good := s.c.Good
	require.Empty(t, ask(good.GetService(), good.GetOperation()), "the good job's service is valid")

	withKey := func(raw []byte) []byte {
		object := map[string]any{}
		if len(raw) > 0 {
			require.NoError(t, json.Unmarshal(raw, &object))
		}
		object["no_such_key"] = true
		out, err := json.Marshal(object)
		require.NoError(t, err)
		return out
	}
	service := proto.CloneOf(good.GetService())
	service.RunnerConfig = withKey(service.GetRunnerConfig())
	service.SecurityPolicy = withKey(service.GetSecurityPolicy())
	operation := &runnerv1.Operation{Name: "op", Config: withKey(good.GetOperation().GetConfig())}
	problems := ask(service, operation)
	for _, path := range []string{"runner_config.no_such_key", "security_policy.no_such_key", "operations.op.no_such_key"} {
		at := slices.IndexFunc(problems, func(p *runnerv1.Problem) bool { return p.GetPath() == path })
		require.GreaterOrEqual(t, at, 0, "a problem at %s: %v", path, problems)
		require.NotEmpty(t, problems[at].GetMessage())
		require.NotEmpty(t, problems[at].GetMend(), "the problem at %s has a mend", path)
	}

	_, err := client.Validate(t.Context(), &runnerv1.ValidateRequest{Service: &runnerv1.Service{
		ExecutionType: good.GetService().GetExecutionType(), RunnerConfig: []byte(`{`),
	}})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
}

func (s *suite) execute(t *testing.T) {
	client := Start(t, s.jr)
	job := s.job(s.c.Good)
	job.Subject, job.TenantId = "ada", "acme"
	out := Execute(t, client, job)
	require.NoError(t, out.Err)
	require.NotNil(t, out.Started)
	require.False(t, out.Started.GetAttached())
	require.NotNil(t, out.Finished)
	require.Nil(t, out.Finished.GetError(), "the good job succeeds: %v", out.Finished.GetError())
	require.True(t, json.Valid(out.Finished.GetOutput()))
	require.NotNil(t, out.Finished.GetUsage().DurationSeconds, "the duration is measured always")
	require.NotEmpty(t, out.Finished.GetUsage().GetSource())
	security := out.Finished.GetSecurity()
	require.Len(t, security.GetPolicyDigest(), 64)
	require.Equal(t, "ada", security.GetSubject())
	require.Equal(t, "acme", security.GetTenantId())
	require.Contains(t, security.GetRunner(), "test-runner@")
	for i, l := range out.Logs {
		require.EqualValues(t, i+1, l.GetLine(), "lines are numbered without gaps")
		require.LessOrEqual(t, len(l.GetText()), runner.MaxLogLine)
	}
	if s.c.Check != nil {
		s.c.Check(t, out)
	}
}

func (s *suite) unknownType(t *testing.T) {
	client := Start(t, s.jr)
	job := s.job(s.c.Good)
	job.Service.ExecutionType = "no_such_type"
	require.Equal(t, codes.InvalidArgument, status.Code(Execute(t, client, job).Err))
	job.Service.ExecutionType = s.c.Good.GetService().GetExecutionType()
	job.Input = []byte(`[]`)
	require.Equal(t, codes.InvalidArgument, status.Code(Execute(t, client, job).Err), "the input must be an object")
}

// slow begins the slow job and waits until it is well under way.
func (s *suite) slow(t *testing.T, client runnerv1.RunnerServiceClient, job *runnerv1.Job) *Call {
	t.Helper()
	call := Begin(t, client, job)
	call.Started()
	if s.c.SlowLine != "" {
		call.Line(s.c.SlowLine)
	}
	return call
}

func (s *suite) gone(t *testing.T) {
	t.Helper()
	if s.c.Gone != nil {
		s.c.Gone(t)
	}
}

func (s *suite) promptly() time.Duration {
	if s.c.Promptly > 0 {
		return s.c.Promptly
	}
	return promptly
}

func (s *suite) cancel(t *testing.T) {
	client := Start(t, s.jr)
	call := s.slow(t, client, s.job(s.c.Slow))
	start := time.Now()
	call.Cancel("a better idea")
	out := call.Wait()
	require.NoError(t, out.Err)
	require.Less(t, time.Since(start), s.promptly())
	require.Equal(t, string(fault.Cancelled), out.Code())
	require.Contains(t, out.Finished.GetError().GetMessage(), "a better idea")
	require.NotNil(t, out.Finished.GetUsage().DurationSeconds)
	s.gone(t)

	// At once, before the runner has begun.
	call = Begin(t, client, s.job(s.c.Slow))
	call.Cancel("at once")
	require.Equal(t, string(fault.Cancelled), call.Wait().Code())
	s.gone(t)
}

func (s *suite) timeout(t *testing.T) {
	client := Start(t, s.jr)
	job := s.job(s.c.Slow)
	job.Timeout = durationpb.New(300 * time.Millisecond)
	start := time.Now()
	out := Execute(t, client, job)
	require.NoError(t, out.Err)
	require.Less(t, time.Since(start), 300*time.Millisecond+s.promptly())
	require.Equal(t, string(fault.Timeout), out.Code())
	require.True(t, out.Finished.GetError().GetRetryable())
	require.Contains(t, out.Finished.GetError().GetMessage(), "300ms")
	require.GreaterOrEqual(t, out.Finished.GetUsage().GetDurationSeconds(), 0.29)
	s.gone(t)
}

func (s *suite) callerGone(t *testing.T) {
	client := Start(t, s.jr)
	call := s.slow(t, client, s.job(s.c.Slow))
	call.Break()
	require.Error(t, call.Wait().Err)
	s.idle(t, client)
	s.gone(t)
}

// idle waits until no job runs.
func (s *suite) idle(t *testing.T, client runnerv1.RunnerServiceClient) {
	t.Helper()
	require.Eventually(t, func() bool {
		d, err := client.Describe(t.Context(), &runnerv1.DescribeRequest{})
		return err == nil && d.GetInFlight() == 0
	}, Patience, 5*time.Millisecond)
}

func (s *suite) bigOutput(t *testing.T) {
	if s.c.Big == nil {
		t.Skip("the runner has no job with a big output")
	}
	allowed := s.c.BigCodes
	if len(allowed) == 0 {
		allowed = []fault.Code{fault.ResourceExceeded, fault.Validation}
	}
	client := Start(t, s.jr)
	out := Execute(t, client, s.job(s.c.Big))
	require.NoError(t, out.Err)
	require.Contains(t, allowed, fault.Code(out.Code()))
	require.NotEmpty(t, out.Finished.GetError().GetMessage())
	require.Empty(t, out.Finished.GetOutput())
	require.Nil(t, Execute(t, client, s.job(s.c.Good)).Finished.GetError(), "the next job is not harmed")
}

func (s *suite) full(t *testing.T) {
	client := Start(t, s.jr, runner.Options{MaxConcurrency: 1, DrainTimeout: time.Second})
	call := s.slow(t, client, s.job(s.c.Slow))
	out := Execute(t, client, s.job(s.c.Good))
	require.Equal(t, codes.ResourceExhausted, status.Code(out.Err))
	require.Nil(t, out.Started, "nothing was started")
	call.Cancel("done")
	require.Equal(t, string(fault.Cancelled), call.Wait().Code())
	require.Nil(t, Execute(t, client, s.job(s.c.Good)).Finished.GetError(), "the place is free at once")
}

func (s *suite) duplicate(t *testing.T) {
	client := Start(t, s.jr, runner.Options{MaxConcurrency: 1, DrainTimeout: time.Second})
	job := s.job(s.c.Slow)
	job.Lease = durationpb.New(time.Minute)
	job.Epoch = 5
	first := s.slow(t, client, job)

	stale := proto.CloneOf(job)
	stale.Epoch = 4
	require.Equal(t, codes.FailedPrecondition, status.Code(Execute(t, client, stale).Err))

	// The caller dies; its successor takes the job over.
	first.Break()
	_ = first.Wait()
	next := proto.CloneOf(job)
	next.Epoch = 6
	second := Begin(t, client, next)
	require.True(t, second.Started().GetAttached())
	second.Cancel("seen")
	out := second.Wait()
	require.Equal(t, string(fault.Cancelled), out.Code())
	s.gone(t)

	// A job that is sent again after its end gives the same result.
	good := s.job(s.c.Good)
	one := Execute(t, client, good)
	two := Execute(t, client, good)
	require.False(t, one.Started.GetAttached())
	require.True(t, two.Started.GetAttached())
	require.Equal(t, one.Finished.GetOutput(), two.Finished.GetOutput())
}

// lease checks that a job ends whose orchestrator stopped without closing its stream.
func (s *suite) lease(t *testing.T) {
	client := Start(t, s.jr)
	job := s.job(s.c.Slow)
	job.Lease = durationpb.New(time.Minute)
	call := s.slow(t, client, job)
	short := proto.CloneOf(job)
	short.Lease = durationpb.New(100 * time.Millisecond)
	short.AttachOnly = true
	require.True(t, Begin(t, client, short).Started().GetAttached())
	out := call.Wait()
	require.NoError(t, out.Err)
	require.Equal(t, string(fault.Unavailable), out.Code())
	require.Contains(t, out.Finished.GetError().GetMessage(), "the lease of 100ms lapsed")
	require.True(t, out.Finished.GetHandedBack())
	s.gone(t)
}

func (s *suite) drain(t *testing.T) {
	client, stop := Serve(t, s.jr, runner.Options{DrainTimeout: 50 * time.Millisecond})
	defer stop()
	call := s.slow(t, client, s.job(s.c.Slow))
	done := make(chan struct{})
	go func() {
		defer close(done)
		stop()
	}()
	out := call.Wait()
	<-done
	require.NoError(t, out.Err)
	require.Equal(t, string(fault.Unavailable), out.Code(), "the job is handed back")
	require.True(t, out.Finished.GetError().GetRetryable())
	require.True(t, out.Finished.GetHandedBack())
	if s.c.HandedOver != nil {
		s.c.HandedOver(t)
	}
	s.gone(t)
}

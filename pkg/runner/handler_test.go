package runner_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scripted is a runner whose operations are functions of the test.
type scripted struct {
	operations map[string]func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error)
	describe   func() (*runner.Description, error)

	mu   sync.Mutex
	runs map[string]int
}

func (s *scripted) Describe(context.Context) (*runner.Description, error) {
	if s.describe != nil {
		return s.describe()
	}
	return &runner.Description{Name: "scripted", Types: []runner.Type{{Name: "test"}, {Name: "another"}}}, nil
}

func (s *scripted) Validate(context.Context, *runner.Service) ([]runner.Problem, error) {
	panic("a defect in Validate")
}

func (s *scripted) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	s.mu.Lock()
	if s.runs == nil {
		s.runs = map[string]int{}
	}
	s.runs[job.ID]++
	s.mu.Unlock()
	return s.operations[job.Operation.Name](ctx, job, sink)
}

func (s *scripted) ran(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.runs[id]
}

type operation = func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error)

// one is a runner with a single operation, op.
func one(op operation) *scripted { return &scripted{operations: map[string]operation{"op": op}} }

func job(id string) *runnerv1.Job {
	return &runnerv1.Job{
		Id: id, Attempt: 1, Epoch: 1, Service: &runnerv1.Service{Name: "s", ExecutionType: "test"},
		Operation: &runnerv1.Operation{Name: "op"}, Input: []byte(`{"a": 1}`),
	}
}

func succeed(output string) operation {
	return func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		return &runner.Result{Output: json.RawMessage(output)}, nil
	}
}

func untilEnd(ctx context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
	sink.Log("stdout", "running")
	<-ctx.Done()
	return &runner.Result{Err: errors.New("the process was killed")}, nil
}

func TestResults(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		op      operation
		code    fault.Code
		message string
		output  string
	}{
		"success": {op: succeed(`{"b": 2}`), output: `{"b": 2}`},
		"nothing": {op: succeed(``), output: `null`},
		"not JSON": {
			op: succeed(`{`), code: fault.Internal, message: "the runner gave an output that is not JSON",
		},
		"no result": {
			op:   func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) { return nil, nil },
			code: fault.Internal, message: "the runner gave no result",
		},
		"a panic": {
			op:   func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) { panic("a defect") },
			code: fault.Internal, message: "the runner panicked in Execute; its log has the stack",
		},
		"its own failure": {
			op: func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
				return nil, fault.New(fault.Unavailable, "no engine")
			},
			code: fault.Unavailable, message: "no engine",
		},
		"a wrapped fault": {
			op: func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
				return &runner.Result{Err: fmt.Errorf("outer: %w", fault.New(fault.PolicyViolation, "no"))}, nil
			},
			code: fault.PolicyViolation, message: "no",
		},
		"a nil fault": {
			op: func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
				var none *fault.Error
				return &runner.Result{Output: json.RawMessage(`1`), Err: none}, nil
			},
			output: `1`,
		},
		"too big": {
			op:   succeed(`"` + strings.Repeat("x", runner.MaxOutputBytes) + `"`),
			code: fault.ResourceExceeded, message: "the output has 4194306 bytes, more than the 4194304 allowed; write large data to a store and return a reference to it",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := runnertest.Execute(t, runnertest.Start(t, one(c.op)), job("j"))
			require.NoError(t, out.Err)
			require.Equal(t, string(c.code), out.Code())
			require.Equal(t, c.message, out.Finished.GetError().GetMessage())
			require.Equal(t, c.output, string(out.Finished.GetOutput()))
			require.NotNil(t, out.Finished.GetUsage().DurationSeconds)
		})
	}
}

func TestRetryAfterAndSecurityContext(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		var checks runner.Checks
		checks.Allow("allowed_domains", "example.com")
		limited := fault.New(fault.RateLimited, "slow down")
		limited.RetryAfter = 7 * time.Second
		return &runner.Result{
			Err: limited, Security: checks.Context("digest", "process_group"),
			Usage: &runnerv1.ResourceUsage{DurationSeconds: new(0.5), Source: "http"},
		}, nil
	}), runner.Options{Identity: "me@here"})
	j := job("j")
	j.Subject, j.TenantId = "ada", "acme"
	out := runnertest.Execute(t, client, j)
	require.Equal(t, 7*time.Second, out.Finished.GetRetryAfter().AsDuration())
	require.True(t, out.Finished.GetError().GetRetryable())
	require.InDelta(t, 0.5, out.Finished.GetUsage().GetDurationSeconds(), 1e-9, "what the runner measured stays")
	require.True(t, proto.Equal(&runnerv1.SecurityContext{
		PolicyDigest: "digest", Subject: "ada", TenantId: "acme", Runner: "me@here", Isolation: []string{"process_group"},
		Checks: []*runnerv1.PolicyCheck{{Rule: "allowed_domains", Subject: "example.com", Allowed: true}},
	}, out.Finished.GetSecurity()))
}

func TestSecretsAreMaskedEverywhere(t *testing.T) {
	t.Parallel()
	const secret = `s3cr"et/+väl<ue`
	const key = "-----BEGIN KEY-----\nMIIabcdefghijkl\n-----END KEY-----\n"
	client := runnertest.Start(t, &scripted{operations: map[string]operation{
		"op": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			sink.Secret(secret)
			sink.Secret(key)
			sink.Secret("abc") // too short
			sink.Secret("12345678")
			sink.Log("stdout", "token="+secret)
			sink.Log("stdout", "abc MIIabcdefghijkl abc")
			escaped, _ := json.Marshal(map[string]any{"k": secret, secret: 12345678, "plain": 1.50})
			sink.Log("stdout", string(escaped))
			sink.Log("stdout", "q=s3cr%22et%2F%2Bv%C3%A4l%3Cue b64=czNjciJldC8rdsOkbDx1ZQ==")
			var checks runner.Checks
			_ = checks.Deny("rule", "subject "+secret, "detail "+secret)
			return &runner.Result{Output: escaped, Security: checks.Context("d")}, nil
		},
		"fail": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			sink.Secret(secret)
			return &runner.Result{Err: fmt.Errorf("401 for %s", secret)}, nil
		},
	}})
	out := runnertest.Execute(t, client, job("j"))
	require.Equal(t, []string{
		"token=***", "abc *** abc", `{"k":"***","plain":1.5,"***":***}`, "q=*** b64=***==",
	}, out.Lines("stdout"))
	require.JSONEq(t, `{"***":"***","k":"***","plain":1.5}`, string(out.Finished.GetOutput()), "masked output stays JSON")
	require.Equal(t, "subject ***", out.Finished.GetSecurity().GetChecks()[0].GetSubject())
	require.Equal(t, "detail ***", out.Finished.GetSecurity().GetChecks()[0].GetDetail())

	j := job("k")
	j.Operation.Name = "fail"
	require.Equal(t, "internal error: 401 for ***", runnertest.Execute(t, client, j).Finished.GetError().GetMessage())
}

func TestLogBounds(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, &scripted{operations: map[string]operation{
		"op": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			for i := range runner.MaxLogLines + 500 {
				sink.Log("stdout", fmt.Sprint("line ", i+1))
			}
			return &runner.Result{}, nil
		},
		"odd": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			sink.Log("stdout", "two\r\nlines\r\n")
			sink.Log("elsewhere", "bad \xff\x00 bytes")
			sink.Log("stderr", strings.Repeat("é", runner.MaxLogLine))
			sink.Log("stderr", "")
			return &runner.Result{}, nil
		},
		"large": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			for range runner.MaxLogBytes/runner.MaxLogLine + 10 {
				sink.Log("stdout", strings.Repeat("x", runner.MaxLogLine))
			}
			return &runner.Result{}, nil
		},
	}})
	out := runnertest.Execute(t, client, job("j"))
	require.Len(t, out.Logs, runner.MaxLogLines+1)
	last := out.Logs[runner.MaxLogLines]
	require.Equal(t, "runner", last.GetStream())
	require.Equal(t, "500 log lines were dropped: the log of an attempt is bounded to 10000 lines and 4 MiB", last.GetText())
	require.EqualValues(t, runner.MaxLogLines+501, last.GetLine(), "the gap shows in the numbers")
	require.Equal(t, "line 10000", out.Logs[runner.MaxLogLines-1].GetText())

	j := job("k")
	j.Operation.Name = "odd"
	out = runnertest.Execute(t, client, j)
	require.Equal(t, []string{"two", "lines", "bad \uFFFD\uFFFD bytes", strings.Repeat("é", runner.MaxLogLine/2), ""}, out.Lines(""))
	require.Equal(t, []string{"bad \uFFFD\uFFFD bytes"}, out.Lines("runner"), "an unknown stream is the runner's")

	j = job("l")
	j.Operation.Name = "large"
	out = runnertest.Execute(t, client, j)
	require.Len(t, out.Logs, runner.MaxLogBytes/runner.MaxLogLine+1)
	require.Contains(t, out.Logs[len(out.Logs)-1].GetText(), "10 log lines were dropped")
}

func TestUsageStreams(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
		sink.Usage(nil)
		sink.Usage(&runnerv1.ResourceUsage{CpuSeconds: proto.Float64(1)})
		<-ctx.Done()
		return &runner.Result{}, nil
	}))
	call := runnertest.Begin(t, client, job("j"))
	call.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetUsage().GetCpuSeconds() == 1 })
	call.Cancel("")
	out := call.Wait()
	require.Equal(t, "cancelled", out.Finished.GetError().GetMessage(), "a cancellation without a reason has a text, too")
	require.Nil(t, out.Usages[0].MemoryMb, "what was not measured is absent")
}

func TestALeaseKeepsTheJobForItsSuccessor(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	s := one(func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
		sink.Log("stdout", "before")
		<-release
		sink.Log("stdout", "after")
		return &runner.Result{Output: json.RawMessage(`"done"`)}, nil
	})
	client := runnertest.Start(t, s)
	j := job("j")
	j.Lease = durationpb.New(time.Minute)
	first := runnertest.Begin(t, client, j)
	first.Line("before")
	first.Break()
	first.Wait()

	j = proto.CloneOf(j)
	j.Epoch, j.Attempt = 2, 2
	j.Input = []byte(`{ "a":1 }`) // the same in other words
	second := runnertest.Begin(t, client, j)
	require.True(t, second.Started().GetAttached())
	second.Renew()

	// A third one with the same epoch reads along.
	third := runnertest.Begin(t, client, j)
	require.True(t, third.Started().GetAttached())
	close(release)
	for _, call := range []*runnertest.Call{second, third} {
		out := call.Wait()
		require.NoError(t, out.Err)
		require.Equal(t, `"done"`, string(out.Finished.GetOutput()))
		require.Contains(t, out.Lines("stdout"), "after")
	}
	require.Equal(t, 1, s.ran("j"))
}

func TestATakeoverEndsTheOldStream(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(untilEnd))
	j := job("j")
	old := runnertest.Begin(t, client, j)
	old.Line("running")
	j = proto.CloneOf(j)
	j.Epoch = 9
	young := runnertest.Begin(t, client, j)
	require.True(t, young.Started().GetAttached())
	require.Equal(t, codes.Aborted, status.Code(old.Wait().Err))
	young.Cancel("enough")
	require.Equal(t, string(fault.Cancelled), young.Wait().Code(), "the old stream's end did not end the job")
}

func TestALapsedLeaseEndsTheJob(t *testing.T) {
	t.Parallel()
	for name, leave := range map[string]bool{"of a stream that broke": true, "of a stream that lives": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ended := make(chan error, 1)
			s := one(func(ctx context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
				sink.Log("stdout", "running")
				<-ctx.Done()
				ended <- context.Cause(ctx)
				return &runner.Result{}, nil
			})
			client := runnertest.Start(t, s)
			j := job("j")
			j.Lease = durationpb.New(50 * time.Millisecond)
			call := runnertest.Begin(t, client, j)
			call.Line("running")
			if leave {
				call.Break()
			}
			select {
			case cause := <-ended:
				require.ErrorContains(t, cause, "UNAVAILABLE: the lease of 50ms lapsed")
			case <-time.After(runnertest.Patience):
				require.Fail(t, "the job lives on")
			}
			out := call.Wait()
			if leave {
				return
			}
			require.NoError(t, out.Err)
			require.Equal(t, string(fault.Unavailable), out.Code())
			require.Contains(t, out.Finished.GetError().GetMessage(), "the lease of 50ms lapsed")
			require.True(t, out.Finished.GetHandedBack(), "it costs the job no attempt")

			// What was not the job's fault is not its result: sent again, it runs again.
			again := runnertest.Begin(t, client, j)
			require.False(t, again.Started().GetAttached())
			again.Wait()
			require.Equal(t, 2, s.ran("j"))
		})
	}
}

func TestRenewalsKeepTheJob(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return &runner.Result{Output: json.RawMessage(`1`)}, nil
	}))
	const lease = time.Second
	j := job("j")
	j.Lease = durationpb.New(lease)
	call := runnertest.Begin(t, client, j)
	call.Started()
	for began := time.Now(); time.Since(began) < 3*lease; {
		call.Renew()
		call.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetRenewed() != nil })
	}
	close(release)
	out := call.Wait()
	require.Empty(t, out.Code(), "the job outlived its first lease: %v", out.Finished.GetError())
	require.Equal(t, "1", string(out.Finished.GetOutput()))
}

func TestAttachOnlyBeginsNothing(t *testing.T) {
	t.Parallel()
	s := &scripted{operations: map[string]operation{"op": untilEnd, "quick": succeed(`1`), "fail": func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		return &runner.Result{Err: fault.New(fault.RemoteError, "no")}, nil
	}}}
	client := runnertest.Start(t, s, runner.Options{MaxConcurrency: 1})
	only := func(j *runnerv1.Job) *runnerv1.Job {
		j = proto.CloneOf(j)
		j.AttachOnly = true
		return j
	}
	refused := func(j *runnerv1.Job) {
		t.Helper()
		out := runnertest.Execute(t, client, only(j))
		require.Equal(t, codes.NotFound, status.Code(out.Err))
		require.Nil(t, out.Started)
	}
	refused(job("j"))
	refused(job(""))
	require.Zero(t, s.ran("j"))

	j := job("j")
	j.Lease = durationpb.New(time.Minute)
	first := runnertest.Begin(t, client, j)
	first.Line("running")
	first.Break()
	first.Wait()
	refused(job("k")) // not RESOURCE_EXHAUSTED: it wants no place
	again := runnertest.Begin(t, client, only(j))
	require.True(t, again.Started().GetAttached())
	again.Cancel("")
	require.Equal(t, string(fault.Cancelled), again.Wait().Code())
	refused(j)
	require.Equal(t, 1, s.ran("j"))

	for _, name := range []string{"quick", "fail"} {
		j = job(name)
		j.Operation.Name = name
		out := runnertest.Execute(t, client, j)
		kept := runnertest.Execute(t, client, only(j))
		require.True(t, kept.Started.GetAttached(), "what ended is kept for who lost the stream")
		require.True(t, proto.Equal(out.Finished, kept.Finished))
	}
	j.Attempt = 2
	refused(j) // the failure of another attempt is not its answer
}

func TestAnAbandonedJobIsNotAttachedTo(t *testing.T) {
	t.Parallel()
	ending, release := make(chan struct{}), make(chan struct{})
	s := one(func(ctx context.Context, j *runner.Job, sink runner.Sink) (*runner.Result, error) {
		if j.Attempt == 2 {
			return &runner.Result{Output: json.RawMessage(`2`)}, nil
		}
		sink.Log("stdout", "running")
		<-ctx.Done()
		close(ending)
		<-release
		return &runner.Result{}, nil
	})
	client := runnertest.Start(t, s)
	call := runnertest.Begin(t, client, job("j"))
	call.Line("running")
	call.Break()
	<-ending
	again := job("j")
	again.Attempt = 2
	out := runnertest.Execute(t, client, again)
	require.Equal(t, codes.Unavailable, status.Code(out.Err))
	require.Nil(t, out.Started, "it counts as no attempt")
	close(release)
	require.Eventually(t, func() bool {
		out = runnertest.Execute(t, client, again)
		return out.Err == nil
	}, runnertest.Patience, time.Millisecond)
	require.Equal(t, "2", string(out.Finished.GetOutput()))
	require.False(t, out.Started.GetAttached())
}

func TestACancelledJobRunsAgainWhenAsked(t *testing.T) {
	t.Parallel()
	s := one(untilEnd)
	client := runnertest.Start(t, s)
	for n := range 2 {
		call := runnertest.Begin(t, client, job("j"))
		call.Line("running")
		call.Cancel("")
		out := call.Wait()
		require.False(t, out.Started.GetAttached())
		require.False(t, out.Finished.GetHandedBack())
		require.Equal(t, n+1, s.ran("j"))
	}
}

func TestAnOldEpochDoesNotComeBack(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*runnertest.Call){
		"a cancel": func(c *runnertest.Call) {
			c.Cancel("")
			c.Wait()
		},
		"a lapsed lease": func(c *runnertest.Call) {
			c.Break()
			c.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := one(untilEnd)
			client := runnertest.Start(t, s)
			j := job("j")
			j.Epoch, j.Lease = 5, durationpb.New(50*time.Millisecond)
			call := runnertest.Begin(t, client, j)
			call.Line("running")
			end(call)
			require.Eventually(t, func() bool {
				d, err := client.Describe(t.Context(), &runnerv1.DescribeRequest{})
				return err == nil && d.GetInFlight() == 0
			}, runnertest.Patience, time.Millisecond)

			stale := proto.CloneOf(j)
			stale.Epoch = 4
			out := runnertest.Execute(t, client, stale)
			require.Equal(t, codes.FailedPrecondition, status.Code(out.Err))
			require.ErrorContains(t, out.Err, "epoch 4 of job j is over: epoch 5 owns it")
			require.Equal(t, 1, s.ran("j"))

			next := proto.CloneOf(j)
			next.Epoch = 6
			call = runnertest.Begin(t, client, next)
			call.Line("running")
			call.Cancel("")
			call.Wait()
			require.Equal(t, 2, s.ran("j"))
		})
	}
}

func TestMaskingDoesNotInflateTheOutput(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, &scripted{operations: map[string]operation{
		"op": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			sink.Secret("s3cret")
			return &runner.Result{Output: json.RawMessage(`{"a":"s3cret` + strings.Repeat("<&>", runner.MaxOutputBytes/3-20) + `"}`)}, nil
		},
		"grow": func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
			sink.Secret("s3cret")
			return &runner.Result{Output: json.RawMessage(`{"a":"s3cret` + strings.Repeat("\u2028", runner.MaxOutputBytes/3-20) + `"}`)}, nil
		},
	}})
	out := runnertest.Execute(t, client, job("j"))
	require.NoError(t, out.Err)
	require.Nil(t, out.Finished.GetError())
	require.Less(t, len(out.Finished.GetOutput()), runner.MaxOutputBytes)
	require.Contains(t, string(out.Finished.GetOutput()[:20]), `"***<&>`)

	// Some characters are escaped always: then it is too large, and that is said.
	j := job("k")
	j.Operation.Name = "grow"
	out = runnertest.Execute(t, client, j)
	require.NoError(t, out.Err)
	require.Equal(t, string(fault.ResourceExceeded), out.Code())
	require.Contains(t, out.Finished.GetError().GetMessage(), "once secrets are masked")
}

func TestOutputHoldsNothingThatADatabaseRefuses(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(succeed(`{"a":"x\u0000y","\u0000k":["\ud800","\ud83d\ude00",12345678901234567890,"`+"\xff"+`"],"b":"\\u0000"}`)))
	out := runnertest.Execute(t, client, job("j"))
	require.Nil(t, out.Finished.GetError())
	require.Equal(t, `{"a":"x�y","b":"\\u0000","�k":["�","😀",12345678901234567890,"�"]}`, string(out.Finished.GetOutput())) //nolint:testifylint // to the byte
}

func TestWhatEndedIsKeptForAWhile(t *testing.T) {
	t.Parallel()
	s := &scripted{operations: map[string]operation{
		"op": succeed(`1`),
		"fail": func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
			return &runner.Result{Err: fault.New(fault.RemoteError, "no")}, nil
		},
	}}
	client := runnertest.Start(t, s)
	j := job("j")
	runnertest.Execute(t, client, j)
	j = proto.CloneOf(j)
	j.Epoch, j.Attempt = 2, 2
	require.True(t, runnertest.Execute(t, client, j).Started.GetAttached(), "a success is not repeated")
	j = proto.CloneOf(j)
	j.Input = []byte(`{"a":2}`)
	require.False(t, runnertest.Execute(t, client, j).Started.GetAttached(), "another input is another call")
	require.Equal(t, 2, s.ran("j"))

	k := job("k")
	k.Operation.Name = "fail"
	runnertest.Execute(t, client, k)
	require.True(t, runnertest.Execute(t, client, k).Started.GetAttached(), "the same attempt has the same outcome")
	k = proto.CloneOf(k)
	k.Attempt = 2
	require.False(t, runnertest.Execute(t, client, k).Started.GetAttached(), "another attempt runs again")
	require.Equal(t, 2, s.ran("k"))
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(untilEnd))
	running := runnertest.Begin(t, client, job("j"))
	running.Line("running")
	for name, c := range map[string]struct {
		change func(*runnerv1.Job)
		code   codes.Code
		text   string
	}{
		"another type":    {func(j *runnerv1.Job) { j.Service.ExecutionType = "shell" }, codes.InvalidArgument, `execution type "shell" is not served here, only another, test`},
		"no type":         {func(j *runnerv1.Job) { j.Service = nil }, codes.InvalidArgument, "start.service.execution_type: is missing"},
		"bad input":       {func(j *runnerv1.Job) { j.Input = []byte(`{"a":`) }, codes.InvalidArgument, "start.input: not valid JSON"},
		"large input":     {func(j *runnerv1.Job) { j.Input = []byte(`{"a":"` + strings.Repeat("x", runner.MaxInputBytes) + `"}`) }, codes.InvalidArgument, "are more than the 4194304 allowed"},
		"bad config":      {func(j *runnerv1.Job) { j.Service.RunnerConfig = []byte(`[]`) }, codes.InvalidArgument, "runner_config: must be a JSON object"},
		"bad policy":      {func(j *runnerv1.Job) { j.Service.SecurityPolicy = []byte(`1`) }, codes.InvalidArgument, "security_policy: must be a JSON object"},
		"bad operation":   {func(j *runnerv1.Job) { j.Operation.Config = []byte(`x`) }, codes.InvalidArgument, "start.operation.config: not valid JSON"},
		"bad timeout":     {func(j *runnerv1.Job) { j.Timeout = durationpb.New(-1) }, codes.InvalidArgument, "start.timeout: is not a duration"},
		"other work":      {func(j *runnerv1.Job) { j.Id, j.Input = "j", []byte(`{"a":2}`) }, codes.FailedPrecondition, "runs already, with another service, operation or input"},
		"an old epoch":    {func(j *runnerv1.Job) { j.Id, j.Epoch = "j", 0 }, codes.FailedPrecondition, "epoch 0 of job j is over: epoch 1 owns it"},
		"a lease too bad": {func(j *runnerv1.Job) { j.Lease = &durationpb.Duration{Nanos: -5} }, codes.InvalidArgument, "start.lease: is not a duration"},
	} {
		j := job("new")
		c.change(j)
		out := runnertest.Execute(t, client, j)
		require.Equal(t, c.code, status.Code(out.Err), name)
		require.ErrorContains(t, out.Err, c.text, name)
		require.Nil(t, out.Started, name)
	}

	stream, err := client.Execute(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Renew{}}))
	_, err = stream.Recv()
	require.Equal(t, codes.InvalidArgument, status.Code(err), "the first message must be start")

	stream, err = client.Execute(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.CloseSend())
	_, err = stream.Recv()
	require.Equal(t, codes.InvalidArgument, status.Code(err))

	_, err = client.Validate(t.Context(), &runnerv1.ValidateRequest{Service: &runnerv1.Service{ExecutionType: "test"}})
	require.Equal(t, codes.Internal, status.Code(err), "a panic in Validate stays inside")
	_, err = client.Validate(t.Context(), &runnerv1.ValidateRequest{Service: &runnerv1.Service{ExecutionType: "nope"}})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	running.Cancel("")
	running.Wait()
}

func TestTheCallerMayHalfClose(t *testing.T) {
	t.Parallel()
	// As grpcurl does: it sends all it has, closes its side and reads on.
	release := make(chan struct{})
	client := runnertest.Start(t, one(func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		<-release
		return &runner.Result{Output: json.RawMessage(`1`)}, nil
	}))
	stream, err := client.Execute(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job("")}}))
	require.NoError(t, stream.CloseSend())
	_, err = stream.Recv()
	require.NoError(t, err)
	close(release)
	last, err := stream.Recv()
	require.NoError(t, err)
	require.Equal(t, "1", string(last.GetFinished().GetOutput()))
}

// keeper is a runner that keeps something for jobs to come.
type keeper struct {
	runner.JobRunner
	draining chan struct{}
}

func (k keeper) Draining() { close(k.draining) }

func TestADrainIsToldWhileJobsRun(t *testing.T) {
	t.Parallel()
	started := make(chan struct{})
	k := keeper{draining: make(chan struct{})}
	k.JobRunner = one(func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		close(started)
		<-k.draining
		return &runner.Result{Output: json.RawMessage(`1`)}, nil
	})
	client, stop := runnertest.Serve(t, k, runner.Options{DrainTimeout: time.Minute})
	call := runnertest.Begin(t, client, job("j"))
	<-started
	stop()
	require.Equal(t, "1", string(call.Wait().Finished.GetOutput()))
}

func TestDrainLetsJobsFinish(t *testing.T) {
	t.Parallel()
	started, release := make(chan struct{}), make(chan struct{})
	client, stop := runnertest.Serve(t, one(func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) {
		close(started)
		<-release
		return &runner.Result{Output: json.RawMessage(`1`)}, nil
	}), runner.Options{DrainTimeout: time.Minute})
	call := runnertest.Begin(t, client, job("j"))
	<-started
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	// While it drains, it takes nothing new.
	require.Eventually(t, func() bool {
		j := job("new")
		j.Service.ExecutionType, j.Operation.Name = "another", "op"
		return status.Code(runnertest.Execute(t, client, j).Err) == codes.Unavailable
	}, runnertest.Patience, time.Millisecond)
	close(release)
	out := call.Wait()
	require.Equal(t, "1", string(out.Finished.GetOutput()))
	<-stopped
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	client := runnertest.Start(t, one(succeed(`1`)), runner.Options{Registerer: registry})
	for _, id := range []string{"a", "b"} {
		runnertest.Execute(t, client, job(id))
	}
	require.NoError(t, testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP specql_runner_jobs_in_flight Attempts that run now.
# TYPE specql_runner_jobs_in_flight gauge
specql_runner_jobs_in_flight 0
# HELP specql_runner_jobs_total Attempts that ended, by execution type and outcome: completed or the error's code.
# TYPE specql_runner_jobs_total counter
specql_runner_jobs_total{execution_type="test",outcome="completed"} 2
`), "specql_runner_jobs_in_flight", "specql_runner_jobs_total"))
}

func TestDescribeFailures(t *testing.T) {
	t.Parallel()
	for name, describe := range map[string]func() (*runner.Description, error){
		"an error":  func() (*runner.Description, error) { return nil, fault.New(fault.Unavailable, "not now") },
		"a panic":   func() (*runner.Description, error) { panic("a defect") },
		"no answer": func() (*runner.Description, error) { return nil, nil },
	} {
		client := runnertest.Start(t, &scripted{describe: describe})
		_, err := client.Describe(t.Context(), &runnerv1.DescribeRequest{})
		require.Error(t, err, name)
	}
}

func TestManyJobsAtOnce(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(func(_ context.Context, j *runner.Job, sink runner.Sink) (*runner.Result, error) {
		for i := range 20 {
			sink.Log("stdout", fmt.Sprint(j.ID, i))
		}
		return &runner.Result{Output: j.Input}, nil
	}), runner.Options{MaxConcurrency: 100})
	var wg sync.WaitGroup
	for worker := range 32 {
		wg.Go(func() {
			for i := range 10 {
				j := job(fmt.Sprintf("job-%d-%d", worker, i))
				j.Input = fmt.Appendf(nil, `{"n":%d}`, i)
				out := runnertest.Execute(t, client, j)
				if !(out.Err == nil && string(out.Finished.GetOutput()) == string(j.GetInput()) && len(out.Logs) == 20) {
					t.Errorf("%s: %v %v", j.GetId(), out.Err, out.Finished)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkExecute(b *testing.B) {
	client := runnertest.Start(b, one(succeed(`{"ok":true}`)))
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		n++
		stream, err := client.Execute(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		if err := stream.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job(fmt.Sprint(n))}}); err != nil {
			b.Fatal(err)
		}
		for err == nil {
			_, err = stream.Recv()
		}
	}
}

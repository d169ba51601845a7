package runner_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// checking is a runner that can check jobs of the past.
type checking struct {
	*scripted
	check func(*runner.RecordedJob) (*runner.CheckResult, error)
}

func (c *checking) Check(_ context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	return c.check(job)
}

func TestCheck(t *testing.T) {
	t.Parallel()
	ask := &runnerv1.CheckRequest{
		Service: &runnerv1.Service{Name: "s", ExecutionType: "test", RunnerConfig: []byte(`{"now": 1}`), SecurityPolicy: []byte(`{"p": 1}`)},
		Jobs:    []*runnerv1.RecordedJob{{Id: "1", RunnerConfig: []byte(`{"then": 1}`), Input: []byte(`{"a": 1}`)}, {Id: "2", ErrorCode: "TIMEOUT"}},
	}
	_, err := runnertest.Start(t, one(succeed(`{}`))).Check(t.Context(), ask)
	require.Equal(t, codes.Unimplemented, status.Code(err))

	c := &checking{scripted: one(nil)}
	h := runnertest.Start(t, c)
	var asked []*runner.RecordedJob
	c.check = func(job *runner.RecordedJob) (*runner.CheckResult, error) {
		asked = append(asked, job)
		if job.ID == "2" {
			return &runner.CheckResult{Unknown: []string{"x"}}, nil
		}
		var checks runner.Checks
		err := checks.Deny("rule", "subject", "no")
		return &runner.CheckResult{Err: err, Checks: checks.Context("").GetChecks()}, nil
	}
	res, err := h.Check(t.Context(), ask)
	require.NoError(t, err)
	require.Equal(t, "POLICY_VIOLATION", res.GetJobs()[0].GetError().GetCode())
	require.Equal(t, "rule", res.GetJobs()[0].GetChecks()[0].GetRule())
	require.Nil(t, res.GetJobs()[1].GetError())
	require.JSONEq(t, `{"p": 1}`, string(asked[0].Service.Policy))
	require.JSONEq(t, `{"then": 1}`, string(asked[0].Service.Config))
	require.JSONEq(t, `{"now": 1}`, string(asked[1].Service.Config))
	require.Equal(t, fault.Timeout, asked[1].ErrorCode)
	require.NotNil(t, asked[1].Usage)
	require.Equal(t, []string{"x"}, res.GetJobs()[1].GetUnknown())

	c.check = func(*runner.RecordedJob) (*runner.CheckResult, error) { panic("a defect") }
	_, err = h.Check(t.Context(), ask)
	require.Equal(t, codes.Internal, status.Code(err))
	c.check = func(*runner.RecordedJob) (*runner.CheckResult, error) { return nil, nil }
	_, err = h.Check(t.Context(), ask)
	require.Equal(t, codes.Internal, status.Code(err))
	for name, bad := range map[string]*runnerv1.CheckRequest{
		"another type": {Service: &runnerv1.Service{ExecutionType: "nope"}},
		"no JSON":      {Service: &runnerv1.Service{ExecutionType: "test", SecurityPolicy: []byte("{")}},
		"a bad input":  {Service: ask.GetService(), Jobs: []*runnerv1.RecordedJob{{Input: []byte("[]")}}},
		"too many":     {Service: ask.GetService(), Jobs: make([]*runnerv1.RecordedJob, 1001)},
	} {
		_, err = h.Check(t.Context(), bad)
		require.Equal(t, codes.InvalidArgument, status.Code(err), name)
	}
}

func TestRecordedLimit(t *testing.T) {
	t.Parallel()
	denied := &runner.RecordedJob{Checks: []*runnerv1.PolicyCheck{{Rule: "k"}}}
	for name, c := range map[string]struct {
		limit   runner.RecordedLimit
		job     *runner.RecordedJob
		changes []bool // which policies' limits have to be raised
		unknown string
	}{
		"no limit":         {limit: runner.RecordedLimit{Key: "k"}},
		"enough":           {limit: runner.RecordedLimit{Key: "k", Service: 5, Used: new(5.0)}},
		"too little":       {limit: runner.RecordedLimit{Key: "k", Service: 4, Used: new(5.0)}, changes: []bool{false}},
		"of both":          {limit: runner.RecordedLimit{Key: "k", Service: 4, Ceiling: 3, Used: new(5.0)}, changes: []bool{false, true}},
		"of the operator":  {limit: runner.RecordedLimit{Key: "k", Service: 9, Ceiling: 3, Used: new(5.0)}, changes: []bool{true}},
		"not measured":     {limit: runner.RecordedLimit{Key: "k", Service: 4}, unknown: "not recorded"},
		"ended by it then": {limit: runner.RecordedLimit{Key: "k", Service: 9, Used: new(5.0)}, job: denied, unknown: "the limit of then"},
	} {
		job := c.job
		if job == nil {
			job = &runner.RecordedJob{}
		}
		var checks runner.Checks
		err, unknown := c.limit.Check(&checks, job)
		if c.unknown == "" {
			require.Empty(t, unknown, name)
		}
		require.Contains(t, unknown, c.unknown, name)
		if c.changes == nil {
			require.Nil(t, err, name)
			continue
		}
		require.Equal(t, fault.ResourceExceeded, err.Code, name)
		var ceilings []bool
		for _, change := range checks.Context("").GetChecks()[0].GetAllowedBy() {
			require.InDelta(t, 5, change.GetSet().GetNumberValue(), 0, name)
			ceilings = append(ceilings, change.GetCeiling())
		}
		require.Equal(t, c.changes, ceilings, name)
	}
}

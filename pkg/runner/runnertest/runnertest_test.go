package runnertest_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type config struct {
	Size int `json:"size,omitempty"`
}

type operation struct {
	Wait bool `json:"wait,omitempty"`
}

type policy struct {
	Allowed bool `json:"allowed,omitempty"`
}

// fake is the smallest honest runner.
type fake struct{}

func (fake) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "fake", Types: []runner.Type{{
		Name:         "fake",
		ConfigSchema: runner.SchemaOf[config](), OperationSchema: runner.SchemaOf[operation](), PolicySchema: runner.SchemaOf[policy](),
	}}}, nil
}

func (fake) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	return runner.CheckService[config, operation, policy](s), nil
}

func (fake) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	c, err := runner.Decode[config](job.Service.Config)
	if err != nil {
		return &runner.Result{Err: err}, nil
	}
	o, err := runner.Decode[operation](job.Operation.Config)
	if err != nil {
		return &runner.Result{Err: err}, nil
	}
	sink.Log("stdout", "working")
	if o.Wait {
		select {
		case <-ctx.Done():
		case <-time.After(time.Minute):
		}
	}
	out, err := json.Marshal(map[string]any{"text": strings.Repeat("x", c.Size)})
	if err != nil {
		return nil, err
	}
	var checks runner.Checks
	checks.Allow("allowed", "it")
	return &runner.Result{
		Output: out, Usage: &runnerv1.ResourceUsage{Source: "rusage"}, Security: checks.Context(runner.Digest(policy{})),
	}, nil
}

func TestConformanceOfTheSmallestRunner(t *testing.T) {
	good := &runnerv1.Job{
		Service:   &runnerv1.Service{Name: "s", ExecutionType: "fake", RunnerConfig: []byte(`{"size":3}`)},
		Operation: &runnerv1.Operation{Name: "o"},
	}
	slow := proto.CloneOf(good)
	slow.Operation.Config = []byte(`{"wait":true}`)
	big := proto.CloneOf(good)
	big.Service.RunnerConfig = []byte(`{"size":5000000}`)
	runnertest.Conformance(t, fake{}, runnertest.Cases{
		Good: good, Slow: slow, SlowLine: "working", Big: big,
		Check: func(t *testing.T, o *runnertest.Outcome) {
			t.Helper()
			require.Equal(t, []string{"working"}, o.Lines("stdout"))
		},
	})
}

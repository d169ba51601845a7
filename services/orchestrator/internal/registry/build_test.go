package registry_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
)

// strictRunner finds a fault in each operation.
type strictRunner struct{}

func (strictRunner) ExecutionTypes() []string { return []string{"http"} }

func (strictRunner) Validate(_ context.Context, req *runnerv1.ValidateRequest) ([]*runnerv1.Problem, error) {
	var out []*runnerv1.Problem
	for _, op := range req.GetOperations() {
		out = append(out, &runnerv1.Problem{Path: "operations." + op.GetName() + ".method", Message: "bad method of " + req.GetService().GetName()})
	}
	return out, nil
}

func TestEveryProblemOfEveryDocumentAtOnce(t *testing.T) {
	t.Parallel()
	reg := `services:
  - name: api
    type: t
    category: c
    operations: [{name: a}, {name: b, method: X}]
  - name: API
    type: t
    category: c
    operations: [{name: c, timeout: soon}]
  - {name: other, type: t, category: c, execution_type: htp, operations: [{name: d}]}
`
	entity := `entity: order
fields: {status: string, customer: {type: uuid, references: customer.id}, again: {type: uuid, references: order.nope}}
actions:
  pay:
    input: {n: integer}
    preconditions: ["statu == 'a'", "$entity.zz == 1"]
    steps:
      - call_service: {service: apii, operation: a, input: {x: $nope, y: $n, z: $order.stat}}
`
	_, problems, err := registry.Build(t.Context(), registry.FromFiles(
		spec.File{Name: "r.yaml", Content: []byte(reg)}, []spec.File{{Name: "e.yaml", Content: []byte(entity)}}, ""),
		registry.BuildOptions{Runners: strictRunner{}})
	require.NoError(t, err)
	var got []string
	for _, p := range problems {
		kind := "error"
		if p.Warning {
			kind = "warning"
		}
		got = append(got, fmt.Sprintf("%s:%d %s %s", p.File, p.Line, kind, p.Path))
	}
	require.Equal(t, []string{
		"e.yaml:2 warning fields.customer.references",
		"e.yaml:2 warning fields.again.references",
		"e.yaml:6 error actions.pay.preconditions[0]",
		"e.yaml:6 error actions.pay.preconditions[1]",
		"e.yaml:8 error actions.pay.steps[0].call_service.service",
		"e.yaml:8 error actions.pay.steps[0].call_service.input.x",
		"e.yaml:8 error actions.pay.steps[0].call_service.input.z",
		"r.yaml:5 error services[0].operations[0].method",
		"r.yaml:5 error services[0].operations[1].method",
		"r.yaml:6 error services[1].name",
		"r.yaml:9 error services[1].operations[0].method",
		"r.yaml:9 error services[1].operations[0].timeout",
		"r.yaml:10 error services[2].execution_type",
	}, got)
}

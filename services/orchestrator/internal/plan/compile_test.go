package plan_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
)

const registryText = `
services:
  - name: bank
    type: t
    category: c
    runner_config: {timeout: 7, retry_config: {max_retries: 2}}
    operations: [{name: charge}, {name: refund, timeout: 3, max_retries: 5}]
`

func compile(t *testing.T, entity, workflow string) (*plan.Plan, spec.Problems) {
	t.Helper()
	reg, problems := spec.ParseRegistry(spec.File{Name: "registry.yaml", Content: []byte(registryText)}, spec.Options{})
	require.NoError(t, problems.Err())
	if entity != "" {
		e, problems := spec.ParseEntity(spec.File{Name: "entity.yaml", Content: []byte(entity)}, spec.Options{})
		require.NoError(t, problems.Err())
		return plan.Compile(e.Actions[0], e, reg)
	}
	a, problems := spec.ParseWorkflow(spec.File{Name: "workflow.yaml", Content: []byte(workflow)}, spec.Options{})
	require.NoError(t, problems.Err())
	return plan.Compile(a, nil, reg)
}

func TestProblems(t *testing.T) {
	t.Parallel()
	cases := []struct{ name, entity, workflow, want string }{
		{
			name:     "unknown service",
			workflow: "actions:\n  - call_service:\n      service: bnak\n      operation: charge\n",
			want:     `workflow.yaml:3:16: steps[0].call_service.service: no service "bnak" in the registry; did you mean bank? services there are: bank`,
		},
		{
			name:     "unknown operation",
			workflow: "actions:\n  - call_service:\n      service: Bank\n      operation: chrage\n",
			want:     `workflow.yaml:4:18: steps[0].call_service.operation: service bank has no operation "chrage"; did you mean charge? operations there are: charge, refund`,
		},
		{
			name:     "a name given twice",
			workflow: "actions:\n  - call_service: {service: bank, operation: charge, as: a}\n  - call_service: {service: bank, operation: charge, as: a}\n",
			want:     `workflow.yaml:3:58: steps[1].call_service.as: the name "a" is taken by the call on line 2; choose another name`,
		},
		{
			name:     "update without an entity",
			workflow: "actions:\n  - update: {set: {a: 1}}\n",
			want:     `workflow.yaml:2:5: steps[0]: update needs an entity, and a workflow of its own has none; move the workflow into an entity's actions`,
		},
		{
			name:     "the entity of a workflow of its own",
			workflow: "actions:\n  - call_service: {service: bank, operation: charge, input: {a: $entity.x}}\n",
			want:     `workflow.yaml:2:65: steps[0].call_service.input.a: $entity needs an entity, and a workflow of its own has none; move the workflow into an entity's actions, or pass the row in the input`,
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p, problems := compile(t, c.entity, c.workflow)
			require.Nil(t, p)
			require.Len(t, problems, 1)
			require.Equal(t, c.want, problems[0].String())
		})
	}
}

func TestNamesThatOnlyTheInputCanGive(t *testing.T) {
	t.Parallel()
	p, problems := compile(t, "", "actions:\n  - call_service: {service: bank, operation: charge, input: {a: $order.total, b: $input.x}}\n  - call_service: {service: bank, operation: refund, input: {c: $charge.id, d: $bank.id}}\n")
	require.Empty(t, problems)
	require.NoError(t, p.CheckInput(map[string]any{"order": 1}).Err())
	missing := p.CheckInput(map[string]any{"ordre": 1})
	require.Len(t, missing, 1)
	require.Equal(t, "workflow.yaml:2:65: steps[0].call_service.input.a: $order is unknown here: no root, no key of the input, no earlier call; did you mean $ordre? names there are: $input, $ordre, $run", missing[0].String())
	open := p.OpenNames()
	require.Len(t, open, 1)
	require.True(t, open[0].Warning)
}

func TestAResponseByAnotherNameIsAWarning(t *testing.T) {
	t.Parallel()
	p, problems := compile(t, "", "actions:\n  - call_service:\n      service: bank\n      operation: charge\n      on_success:\n        - call_service: {service: bank, operation: refund, input: {a: $api_response.data}}\n")
	require.NotNil(t, p)
	require.Len(t, problems, 1)
	require.True(t, problems[0].Warning)
	require.Equal(t, 6, problems[0].Line)
	require.Contains(t, problems[0].String(), "$api_response is taken as the response of charge")
}

func TestDefaultsOfACall(t *testing.T) {
	t.Parallel()
	p, problems := compile(t, "", "actions:\n  - call_service: {service: bank, operation: charge}\n  - call_service: {service: bank, operation: refund}\n  - call_service: {service: bank, operation: refund, timeout: 1, max_retries: 0}\n")
	require.Empty(t, problems)
	var got []string
	for _, c := range p.Calls() {
		got = append(got, c.Timeout.String()+" "+strings.Repeat("r", *c.MaxRetries))
	}
	require.Equal(t, []string{"7s rr", "3s rrrrr", "1s "}, got)
}

func TestPreconditionsReadFields(t *testing.T) {
	t.Parallel()
	p, problems := compile(t, "entity: order\nfields: {status: string}\nactions:\n  pay:\n    input: {status: string}\n    preconditions: [\"status == 'a' && $status == 'b'\"]\n    steps:\n      - call_service: {service: bank, operation: charge}\n", "")
	require.NoError(t, problems.Err())
	require.True(t, p.UsesEntity)
	require.Equal(t, map[string]bool{"status": true}, p.Preconditions[0].Fields)
	require.Contains(t, p.Preconditions[0].Bindings, "status")
}

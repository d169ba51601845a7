package spec_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

func TestSteps(t *testing.T) {
	a := payment(t).Action("process_payment")
	var got []string
	spec.Walk(a.Steps, func(s spec.Step) bool {
		got = append(got, s.Kind()+" "+s.Path())
		require.Positive(t, s.Pos().Line)
		return true
	})
	require.Empty(t, cmp.Diff([]string{
		"validate steps[0]",
		"call_service steps[1]",
		"update steps[1].on_success[0]",
		"update steps[1].on_failure[0]",
		"fail steps[1].on_failure[1]",
		"parallel steps[2]",
		"call_service steps[2].branches[0]",
		"if steps[2].branches[1]",
		"wait steps[2].branches[1].then[0]",
		"wait steps[2].branches[1].else[0]",
		"parallel steps[3]",
		"call_service steps[3].branches[0]",
		"call_service steps[3].branches[1].steps[0]",
		"await_signal steps[3].branches[1].steps[1]",
		"foreach steps[4]",
		"call_service steps[4].do[0]",
	}, got))

	call := a.Steps[1].(*spec.CallService)
	require.Equal(t, "charge", call.As)
	require.Equal(t, 2500*time.Millisecond, *call.Timeout)
	require.Equal(t, 0, *call.MaxRetries)
	require.Equal(t, "documents/entity_payment.yaml:33:22", call.PositionOf("operation").String())
	require.Equal(t, "documents/entity_payment.yaml:34:59", call.PositionOf("input.source").String())
	require.Equal(t, call.PositionOf("input"), call.PositionOf("input.nothing"))
	require.Equal(t, "documents/entity_payment.yaml:27:9", a.PositionOf("preconditions[0]").String())
	long := a.Steps[3].(*spec.Parallel)
	require.Equal(t, 2, long.MaxConcurrency)
	require.True(t, long.WaitAll)
	require.Len(t, long.Branches[1], 2)
	loop := a.Steps[4].(*spec.Foreach)
	require.Equal(t, "tag", loop.As)
	require.Equal(t, 4, loop.MaxConcurrency)
	inner := loop.Do[0].(*spec.CallService)
	require.NotNil(t, inner.OnFailure, "an empty on_failure handles the failure")
	require.Nil(t, inner.OnSuccess)
	require.Nil(t, inner.Timeout)
	require.Len(t, a.Preconditions, 2)
	require.True(t, a.Input.Requires("card_token"))
	require.False(t, a.Input.Requires("attempts"))
	require.Equal(t, []string{"attempts", "card_token", "note"}, a.Input.Keys())
}

func TestWorkflow(t *testing.T) {
	a, problems := spec.ParseWorkflow(readFile(t, "documents/workflow_import.yaml"), spec.Options{})
	require.Empty(t, problems)
	require.Equal(t, "import-files", a.Name)
	require.Equal(t, 1, a.Steps[0].(*spec.Foreach).MaxConcurrency)
	require.Equal(t, map[string]any{"files": []any{"a"}, "options": map[string]any{"mode": "fast"}},
		a.Input.ApplyDefaults(map[string]any{"files": []any{"a"}, "options": map[string]any{}}))
	require.Empty(t, cmp.Diff([]spec.Violation{{Path: "files[1]", Message: "must be a string, is a number"}, {Path: "options.mode", Message: "must be one of fast, slow"}},
		a.Input.Validate(map[string]any{"files": []any{"a", 1.0}, "options": map[string]any{"mode": "slwo"}})))
}

func TestWorkflowProblems(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"an entity":     {"entity: e\nactions: []\n", []string{"1:1: entity: this is an entity, not a workflow; name the entity and the action, rather than the file"}},
		"nothing to do": {"input: {}\n", []string{"1:1: the key \"actions\" is missing; add `actions:` with a list of steps"}},
		"empty":         {"actions:\n", []string{"1:1: actions: holds no steps; add a step, such as `- call_service:`"}},
		"not a list":    {"actions: {call_service: {service: a, operation: b}}\n", []string{"1:10: actions: must be a list of steps, is one step; write it behind a `- `"}},
		"unknown step":  {"actions: [{call_servce: {}}]\n", []string{`1:12: actions[0].call_servce: unknown kind of step "call_servce"; did you mean "call_service"?`}},
		"a bare word":   {"actions: [wait]\n", []string{"1:11: actions[0]: must be a step, is a string; write `wait:` with its settings below"}},
		"not indented": {"actions:\n  - call_service:\n    service: a\n    operation: b\n", []string{
			"2:5: actions[0].call_service: is empty; its keys are: service, operation, input, as, on_success, on_failure, timeout, max_retries",
			`3:5: actions[0].service: "service" belongs below call_service; indent it further`,
			`4:5: actions[0].operation: "operation" belongs below call_service; indent it further`,
		}},
		"two kinds": {"actions:\n  - wait: {seconds: 1}\n    fail: x\n", []string{"3:5: actions[0].fail: a step is of one kind, this one is also wait; begin a new step with `- fail:`"}},
		"call": {"actions:\n  - call_service: {servce: a, input: [1], as: 1x, timeout: 0, max_retries: 1.5, on_failure: x}\n", []string{
			"2:5: actions[0].call_service: the key \"operation\" is missing; add `operation:`",
			"2:5: actions[0].call_service: the key \"service\" is missing; add `service:`",
			`2:20: actions[0].call_service.servce: unknown key "servce"; did you mean "service"?`,
			"2:38: actions[0].call_service.input: must be a map or a reference to one, is a list",
			"2:47: actions[0].call_service.as: \"1x\" cannot be used as a name; use letters, digits and `_`, and no digit first",
			"2:60: actions[0].call_service.timeout: must be more than 0 and at most 31622400 seconds, is 0",
			"2:76: actions[0].call_service.max_retries: must be a whole number, is a number",
			"2:93: actions[0].call_service.on_failure: must be a list, is a string",
		}},
		"expressions": {"actions:\n  - call_service:\n      service: a\n      operation: b\n      input:\n        x: ['${ 1 + }', ok]\n        y: '${'\n", []string{
			"6:13: actions[0].call_service.input.x[0]: `1 +`: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}",
			"7:12: actions[0].call_service.input.y: `${`: `${` is not closed; add a `}`, or write `$${` for the characters themselves",
		}},
		"other steps": {"actions:\n  - if: {condition: [1]}\n  - foreach: {items: 3, max_concurrency: 0}\n  - parallel: {branches: [], on_error: wait_al}\n  - wait: {}\n  - wait: {seconds: 1, until: x}\n  - wait: {seconds: soon}\n  - wait: {until: tomorrow}\n  - await_signal: {timeout: often}\n  - fail:\n  - validate: {}\n  - update: {set: {}}\n  - call_service: {service: a, operation: b, as: input}\n", []string{
			"2:5: actions[0].if: the key \"then\" is missing; add `then:` with a list of steps",
			"2:21: actions[0].if.condition: must be a condition, is a list; write it in quotes, as in `\"$input.amount > 0\"`",
			"3:5: actions[1].foreach: the key \"do\" is missing; add `do:` with a list of steps",
			"3:22: actions[1].foreach.items: must be a list or a reference to one, is a number; write a list, or a reference such as `$input.files`",
			"3:42: actions[1].foreach.max_concurrency: must be between 1 and 10000, is 0",
			"4:26: actions[2].parallel.branches: holds no steps; add a step",
			`4:40: actions[2].parallel.on_error: must be fail_fast or wait_all, is "wait_al"; did you mean "wait_all"?`,
			"5:5: actions[3].wait: one of the keys \"seconds\" and \"until\" is missing; add `seconds:`",
			"6:24: actions[4].wait.until: `seconds` and `until` exclude each other; keep one of the two",
			"7:21: actions[5].wait.seconds: must be a number of seconds",
			"8:19: actions[6].wait.until: must be a timestamp such as \"2030-01-31T12:00:00Z\"",
			"9:5: actions[7].await_signal: the key \"name\" is missing; add `name:`",
			"9:29: actions[7].await_signal.timeout: must be a number of seconds or a time such as `2h`",
			"10:5: actions[8].fail: is empty; its keys are: message",
			"11:5: actions[9].validate: the key \"conditions\" is missing; add `conditions:` with a list",
			"12:19: actions[10].update.set: sets no field",
			"13:50: actions[11].call_service.as: $input is always something else; choose another name",
		}},
		"both names": {"actions: []\nsteps: []\n", []string{"2:1: steps: `actions` and `steps` are two names of the same list; join them"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, problems := spec.ParseWorkflow(spec.File{Name: "w.yaml", Content: []byte(test.text)}, spec.Options{})
			require.Empty(t, cmp.Diff(test.want, findings(problems)))
		})
	}
}

func TestDeepStepsAreRefused(t *testing.T) {
	text := "actions: "
	for range 45 {
		text += "[{parallel: "
	}
	text += "[]"
	for range 45 {
		text += "}]"
	}
	_, problems := spec.ParseWorkflow(spec.File{Name: "w.yaml", Content: []byte(text)}, spec.Options{})
	require.True(t, problems.HasErrors())
	require.ErrorContains(t, problems.Err(), "deep")
}

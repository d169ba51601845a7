package jsonform

import (
	"bytes"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

func write(t *testing.T, v any) string {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, Write(&b, v))
	return b.String()
}

func TestRun(t *testing.T) {
	input, err := structpb.NewStruct(map[string]any{"status": "STATUS_FAILED", "html": "<b>&"})
	require.NoError(t, err)
	run := &specqlv1.Run{
		Id: "r1", Entity: "payment", Action: "charge", Status: specqlv1.Status_STATUS_FAILED, Input: input,
		Error:     &runnerv1.Error{Code: "REMOTE_ERROR", Message: "declined"},
		CreatedAt: timestamppb.New(time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)),
		Jobs: []*specqlv1.Job{{
			Id: "j1", Service: "stripe", Operation: "charge", ExecutionType: "http", Status: specqlv1.Status_STATUS_COMPLETED,
			Output:          structpb.NewNullValue(),
			ResourceUsage:   &runnerv1.ResourceUsage{DurationSeconds: new(0.0), CpuSeconds: new(0.25), Source: "http"},
			SecurityContext: &runnerv1.SecurityContext{Checks: []*runnerv1.PolicyCheck{{Rule: "allowed_domains", Subject: "api.stripe.com", Allowed: true}}},
		}},
	}
	o, err := Message(run)
	require.NoError(t, err)
	require.JSONEq(t, `{
		"id": "r1", "entity": "payment", "action": "charge", "status": "failed",
		"input": {"status": "STATUS_FAILED", "html": "<b>&"},
		"error": {"code": "REMOTE_ERROR", "message": "declined", "retryable": false, "attempts": 0},
		"jobs": [{
			"id": "j1", "service": "stripe", "operation": "charge", "executionType": "http", "status": "completed", "attempts": 0, "output": null, "payloadsOmitted": false,
			"resourceUsage": {"durationSeconds": 0, "cpuSeconds": 0.25, "source": "http"},
			"securityContext": {"checks": [{"rule": "allowed_domains", "subject": "api.stripe.com", "allowed": true, "allowedBy": []}], "isolation": []},
			"maxAttempts": 0
		}],
		"createdAt": "2026-11-21T12:00:00Z", "retries": 0, "waiting": []
	}`, write(t, o))
	require.Contains(t, write(t, o), `<b>&`)
	require.Equal(t, "id", o[0].Name, "fields keep the proto's order")

	empty, err := Message(&specqlv1.Run{Id: "r2"})
	require.NoError(t, err)
	require.JSONEq(t, `{"id": "r2", "status": "unspecified", "jobs": [], "retries": 0, "waiting": []}`, write(t, empty))

	list, err := Runs([]*specqlv1.Run{{Id: "r3", Status: specqlv1.Status_STATUS_RUNNING}})
	require.NoError(t, err)
	require.JSONEq(t, `[{"id": "r3", "status": "running", "retries": 0}]`, write(t, list))
}

func TestBytesAndNumbers(t *testing.T) {
	o, err := Message(&specqlv1.Runner{
		ExecutionType: "wasm", Address: "127.0.0.1:1", Reachable: true,
		Description: &runnerv1.DescribeResponse{Capacity: 4, Types: []*runnerv1.ExecutionType{{Name: "wasm", ConfigSchema: []byte(`{"type":"object"}`), PolicySchema: []byte("\xff")}}},
	})
	require.NoError(t, err)
	require.JSONEq(t, `{"executionType": "wasm", "address": "127.0.0.1:1", "reachable": true, "description": {
		"types": [{"name": "wasm", "configSchema": {"type": "object"}, "policySchema": "/w==", "defaultMaxRetries": 0}],
		"capacity": 4, "inFlight": 0, "isolation": []}}`, write(t, o))

	o, err = Message(&specqlv1.LogLine{Line: 12, Text: "x"})
	require.NoError(t, err)
	require.JSONEq(t, `{"attempt": 0, "line": 12, "text": "x"}`, write(t, o))

	_, err = marshal(Object{{Name: "x", Value: math.NaN()}})
	require.Error(t, err)
	require.Equal(t, "{}\n", write(t, Object{}))
}

func TestMaps(t *testing.T) {
	o, err := Message(&specqlv1.AlertChange{From: "pending", To: "firing", Values: map[string]float64{"b": 2, "a": 0.5}})
	require.NoError(t, err)
	require.Regexp(t, `(?s)"values": \{\s*"a": 0.5,\s*"b": 2\s*\}`, write(t, o))
	o, err = Message(&specqlv1.AlertChange{})
	require.NoError(t, err)
	require.JSONEq(t, `{"values": {}}`, write(t, o))
}

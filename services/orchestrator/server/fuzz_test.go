package server_test

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/mesh/rpcfuzz"
)

// fuzzed starts an orchestrator whose runner ends every job at once, with one run in it.
func fuzzed(f *testing.F) (*system, string) {
	f.Helper()
	s := start(f, f.TempDir())
	close(s.runner.release)
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case <-s.runner.arrived:
			case <-ended:
				return
			}
		}
	}()
	f.Cleanup(func() { close(ended) })
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("say"), IdempotencyKey: "key"})
	return s, run.GetId()
}

func one(m proto.Message) []proto.Message { return []proto.Message{m} }

func FuzzOrchestratorService(f *testing.F) {
	s, id := fuzzed(f)
	input, err := structpb.NewStruct(map[string]any{"n": 1, "label": "x"})
	if err != nil {
		f.Fatal(err)
	}
	rpcfuzz.Service(f, s.conn, specqlv1.File_specql_v1_orchestrator_proto.Services().ByName("OrchestratorService"), rpcfuzz.Options{Seeds: map[string][][]proto.Message{
		"ExecuteAction": {
			one(&specqlv1.ExecuteActionRequest{Entity: "thing", Action: "make", Input: input, Wait: durationpb.New(1)}),
			one(&specqlv1.ExecuteActionRequest{Workflow: workflow("hold"), Input: input, IdempotencyKey: "key", CorrelationId: "c"}),
			one(&specqlv1.ExecuteActionRequest{Workflow: workflow("refuse"), EntityId: "1", Wait: &durationpb.Duration{Seconds: -1, Nanos: 5}}),
		},
		"GetRun":    {one(&specqlv1.GetRunRequest{Id: id})},
		"ListRuns":  {one(&specqlv1.ListRunsRequest{PageSize: 1, Entity: "thing", PageToken: "x", Statuses: []specqlv1.Status{99}})},
		"WatchRun":  {one(&specqlv1.WatchRunRequest{Id: id})},
		"CancelRun": {one(&specqlv1.CancelRunRequest{Id: id, Reason: "r"})},
		"RetryRun":  {one(&specqlv1.RetryRunRequest{Id: id})},
		"SignalRun": {one(&specqlv1.SignalRunRequest{Id: id, Name: "s", Payload: structpb.NewStringValue("x")})},
	}})
}

func FuzzRegistryService(f *testing.F) {
	s, _ := fuzzed(f)
	document := &specqlv1.Document{Name: "r.yaml", Content: []byte(echoRegistry)}
	entity := &specqlv1.Document{Name: "e.yaml", Content: []byte(echoEntity)}
	rpcfuzz.Service(f, s.conn, specqlv1.File_specql_v1_registry_proto.Services().ByName("RegistryService"), rpcfuzz.Options{Seeds: map[string][][]proto.Message{
		"ValidateRegistry":  {one(&specqlv1.ValidateRegistryRequest{Registry: document, Entities: []*specqlv1.Document{entity}, Env: "e", Strict: true}), one(&specqlv1.ValidateRegistryRequest{})},
		"ApplyRegistry":     {one(&specqlv1.ApplyRegistryRequest{Registry: document, Entities: []*specqlv1.Document{entity}})},
		"SetExecutionTypes": {one(&specqlv1.SetExecutionTypesRequest{Disable: []string{"echo"}}), one(&specqlv1.SetExecutionTypesRequest{Enable: []string{"echo", "http"}, Disable: []string{"http"}})},
	}})
}

func FuzzInsightService(f *testing.F) {
	s, _ := fuzzed(f)
	filter := &specqlv1.JobFilter{ExecutionType: "echo", Service: "svc"}
	rpcfuzz.Service(f, s.conn, specqlv1.File_specql_v1_insight_proto.Services().ByName("InsightService"), rpcfuzz.Options{Seeds: map[string][][]proto.Message{
		"GetPerformance":     {one(&specqlv1.GetPerformanceRequest{Filter: filter})},
		"GetResourceUsage":   {one(&specqlv1.GetResourceUsageRequest{Filter: filter})},
		"GetFailurePatterns": {one(&specqlv1.GetFailurePatternsRequest{Filter: filter})},
		"GetSecurityAudit":   {one(&specqlv1.GetSecurityAuditRequest{Filter: filter, Limit: -1})},
		"GetQueueHealth":     {one(&specqlv1.GetQueueHealthRequest{ExecutionType: "echo"})},
		"GetCost":            {one(&specqlv1.GetCostRequest{Service: "svc"})},
	}})
}

package e2e

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// reflector asks a server about itself, as grpcurl does: it knows nothing of the generated code.
type reflector struct {
	stream reflectionv1.ServerReflection_ServerReflectionInfoClient
	files  *protoregistry.Files
}

func (r *reflector) ask(t *testing.T, req *reflectionv1.ServerReflectionRequest) *reflectionv1.ServerReflectionResponse {
	t.Helper()
	require.NoError(t, r.stream.Send(req))
	resp, err := r.stream.Recv()
	require.NoError(t, err)
	require.Nil(t, resp.GetErrorResponse())
	return resp
}

// load gets a file and all that it imports.
func (r *reflector) load(t *testing.T, resp *reflectionv1.ServerReflectionResponse) {
	t.Helper()
	for _, raw := range resp.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		require.NoError(t, proto.Unmarshal(raw, &file))
		if _, err := r.files.FindFileByPath(file.GetName()); err == nil {
			continue
		}
		for _, name := range file.GetDependency() {
			if _, err := r.files.FindFileByPath(name); err != nil {
				r.load(t, r.ask(t, &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileByFilename{FileByFilename: name}}))
			}
		}
		built, err := protodesc.NewFile(&file, r.files)
		require.NoError(t, err)
		require.NoError(t, r.files.RegisterFile(built))
	}
}

func (r *reflector) service(t *testing.T, name string) protoreflect.ServiceDescriptor {
	t.Helper()
	r.load(t, r.ask(t, &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: name}}))
	found, err := r.files.FindDescriptorByName(protoreflect.FullName(name))
	require.NoError(t, err)
	return found.(protoreflect.ServiceDescriptor)
}

func TestReflectionIsEnoughToStartAndWatchARun(t *testing.T) {
	d, _ := withServices(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	conn := d.Conn()
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	require.NoError(t, err)
	r := &reflector{stream: stream, files: &protoregistry.Files{}}

	var services []string
	list := r.ask(t, &reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
	for _, s := range list.GetListServicesResponse().GetService() {
		services = append(services, s.GetName())
	}
	require.Subset(t, services, []string{"specql.v1.OrchestratorService", "specql.v1.RegistryService", "grpc.health.v1.Health"})

	orchestrator := r.service(t, "specql.v1.OrchestratorService")
	var methods []string
	for i := range orchestrator.Methods().Len() {
		methods = append(methods, string(orchestrator.Methods().Get(i).Name()))
	}
	require.Subset(t, methods, []string{"ExecuteAction", "GetRun", "ListRuns", "WatchRun", "CancelRun", "RetryRun", "SignalRun"})

	execute := orchestrator.Methods().ByName("ExecuteAction")
	request, answer := dynamicpb.NewMessage(execute.Input()), dynamicpb.NewMessage(execute.Output())
	require.NoError(t, protojson.Unmarshal([]byte(`{"workflow": "actions: [{call_service: {service: worker, operation: work, input: {n: 1}}}]"}`), request))
	require.NoError(t, conn.Invoke(ctx, "/specql.v1.OrchestratorService/ExecuteAction", request, answer))
	run := answer.Get(execute.Output().Fields().ByName("run")).Message()
	id := run.Get(run.Descriptor().Fields().ByName("id")).String()
	require.NotEmpty(t, id)

	watch := orchestrator.Methods().ByName("WatchRun")
	events, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/specql.v1.OrchestratorService/WatchRun")
	require.NoError(t, err)
	request = dynamicpb.NewMessage(watch.Input())
	request.Set(watch.Input().Fields().ByName("id"), protoreflect.ValueOfString(id))
	require.NoError(t, events.SendMsg(request))
	require.NoError(t, events.CloseSend())
	var last string
	for {
		event := dynamicpb.NewMessage(watch.Output())
		if err := events.RecvMsg(event); err != nil {
			require.ErrorContains(t, err, "EOF")
			break
		}
		last = protojson.Format(event)
	}
	require.Contains(t, last, "STATUS_COMPLETED")
	require.Contains(t, last, id)

	health, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{})
	require.NoError(t, err)
	require.Equal(t, healthv1.HealthCheckResponse_SERVING, health.GetStatus())
}

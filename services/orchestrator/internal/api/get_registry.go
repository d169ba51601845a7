package api

import (
	"context"

	"google.golang.org/protobuf/types/known/structpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/spec"
)

// GetRegistry implements RegistryService.
func (r *Registry) GetRegistry(context.Context, *specqlv1.GetRegistryRequest) (*specqlv1.GetRegistryResponse, error) {
	s := r.Registry.Current()
	resp := &specqlv1.GetRegistryResponse{Digest: s.Digest, Env: s.Env, AppliedAt: timeProto(s.AppliedAt)}
	for _, svc := range s.Registry.Services {
		info := &specqlv1.ServiceInfo{
			Name: svc.Name, Type: svc.Type, Category: svc.Category, ExecutionType: svc.ExecutionType,
			RunnerConfig: fromMap(svc.RunnerConfig), SecurityPolicy: fromMap(svc.SecurityPolicy),
		}
		for _, op := range svc.Operations {
			o := &specqlv1.OperationInfo{
				Name: op.Name, InputSchema: schemaStruct(op.Input), OutputSchema: schemaStruct(op.Output), TimeoutSeconds: op.Timeout.Seconds(),
			}
			if op.MaxRetries != nil {
				n := int32(*op.MaxRetries) //nolint:gosec // bounded by spec
				o.MaxRetries = n
			}
			info.Operations = append(info.Operations, o)
		}
		resp.Services = append(resp.Services, info)
	}
	for _, e := range s.Entities {
		entity := &specqlv1.Entity{Name: e.Name, Schema: e.Schema}
		for _, a := range e.Actions {
			entity.Actions = append(entity.Actions, &specqlv1.Action{Name: a.Name, InputSchema: schemaStruct(a.Input)})
		}
		resp.Entities = append(resp.Entities, entity)
	}
	return resp, nil
}

func schemaStruct(s *spec.Schema) *structpb.Struct {
	if s == nil {
		return nil
	}
	return fromMap(s.JSON())
}

package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
)

// ValidateRegistry implements RegistryService.
func (r *Registry) ValidateRegistry(ctx context.Context, req *specqlv1.ValidateRegistryRequest) (*specqlv1.ValidateRegistryResponse, error) {
	if err := checkDocuments(req.GetRegistry(), req.GetEntities(), req.GetEnv(), false); err != nil {
		return nil, err
	}
	d := documents(req.GetRegistry(), req.GetEntities(), req.GetEnv())
	if req.GetRegistry() == nil {
		current := r.Registry.CurrentDocuments()
		d.Registry, d.Vars = current.Registry, current.Vars
		if d.Env == "" {
			d.Env = current.Env
		}
	}
	problems, err := r.Registry.Validate(ctx, d, req.GetStrict())
	if err != nil {
		return nil, err
	}
	return &specqlv1.ValidateRegistryResponse{Problems: problemProtos(problems)}, nil
}

func checkDocuments(reg *specqlv1.Document, entities []*specqlv1.Document, env string, need bool) error {
	var v intake.Violations
	name(&v, "env", env)
	if need && reg == nil {
		v.Add("registry", "is missing")
	}
	if len(reg.GetContent()) > maxDocument {
		v.Add("registry.content", "has %d bytes; at most %d are taken", len(reg.GetContent()), maxDocument)
	}
	if len(entities) > maxEntities {
		v.Add("entities", "are %d; at most %d are taken", len(entities), maxEntities)
	}
	name(&v, "registry.name", reg.GetName())
	for _, e := range entities {
		name(&v, "entities.name", e.GetName())
		if len(e.GetContent()) > maxDocument {
			v.Add("entities.content", "%s has %d bytes; at most %d are taken", e.GetName(), len(e.GetContent()), maxDocument)
		}
	}
	return v.Err()
}

func documents(reg *specqlv1.Document, entities []*specqlv1.Document, env string) registry.Documents {
	files := make([]spec.File, 0, len(entities))
	for _, e := range entities {
		files = append(files, spec.File{Name: e.GetName(), Content: e.GetContent()})
	}
	return registry.FromFiles(spec.File{Name: reg.GetName(), Content: reg.GetContent()}, files, env)
}

func problemProtos(problems spec.Problems) []*specqlv1.RegistryProblem {
	out := make([]*specqlv1.RegistryProblem, 0, len(problems))
	for _, p := range problems {
		out = append(out, &specqlv1.RegistryProblem{
			File: p.File, Line: int32(p.Line), Column: int32(p.Column), //nolint:gosec // bounded by the file's size
			Path: p.Path, Message: p.Message, Mend: p.Mend, Warning: p.Warning,
		})
	}
	return out
}

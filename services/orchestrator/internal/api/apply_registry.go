package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
)

// ApplyRegistry implements RegistryService.
func (r *Registry) ApplyRegistry(ctx context.Context, req *specqlv1.ApplyRegistryRequest) (*specqlv1.ApplyRegistryResponse, error) {
	if err := auth.From(ctx).MayAll(); err != nil {
		return nil, err
	}
	if err := checkDocuments(req.GetRegistry(), req.GetEntities(), req.GetEnv(), true); err != nil {
		return nil, err
	}
	s, problems, err := r.Registry.Apply(ctx, documents(req.GetRegistry(), req.GetEntities(), req.GetEnv()))
	if err != nil {
		return nil, err
	}
	if s != nil {
		r.Logger.Info("a registry is in force", "digest", s.Digest, "services", len(s.Registry.Services), "entities", len(s.Entities))
	}
	return &specqlv1.ApplyRegistryResponse{
		Digest: r.Registry.Current().Digest, Applied: s != nil, Problems: problemProtos(problems),
	}, nil
}

package api

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
)

// ListRunners implements RegistryService.
func (r *Registry) ListRunners(ctx context.Context, _ *specqlv1.ListRunnersRequest) (*specqlv1.ListRunnersResponse, error) {
	types := r.Runners.ExecutionTypes()
	resp := &specqlv1.ListRunnersResponse{Runners: make([]*specqlv1.Runner, len(types))}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for i, t := range types {
		wg.Go(func() {
			out := &specqlv1.Runner{ExecutionType: t, Address: r.Runners.Address(t)}
			d, err := r.Runners.Describe(ctx, t)
			if err != nil {
				out.Error = fault.From(err).Message
			} else {
				out.Reachable, out.Description = true, d
			}
			resp.Runners[i] = out
		})
	}
	wg.Wait()
	resp.Now = timestamppb.Now()
	return resp, nil
}

package api

import (
	"context"
	"errors"

	"google.golang.org/grpc"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Interceptors are those of the API's server: whatever is asked while the database is away
// is UNAVAILABLE, so that clients ask again.
func Interceptors() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			resp, err := handle(ctx, req)
			return resp, unavailable(err)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			return unavailable(handle(srv, stream))
		}),
	}
}

// unavailable says in the terms of the API that the database is away.
func unavailable(err error) error {
	if _, known := fault.As(err); known || !errors.Is(err, store.ErrUnavailable) {
		return err
	}
	return fault.Wrap(err, fault.Unavailable, "the database is not available; ask again in a moment")
}

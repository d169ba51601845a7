package auth

import (
	"context"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
)

// recheck is how often a stream's caller is looked at again.
const recheck = 10 * time.Second

// Interceptors tell handlers who calls, and refuse whoever may not.
func (a *Authenticator) Interceptors() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			c, err := a.admit(ctx, info.FullMethod)
			if err != nil {
				return nil, err
			}
			return handle(With(ctx, c), req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			ctx := stream.Context()
			c, err := a.admit(ctx, info.FullMethod)
			if err != nil {
				return err
			}
			ctx = With(ctx, c)
			if !a.Enabled() || open(info.FullMethod) {
				return handle(srv, callerStream{stream, ctx})
			}
			// A token that ends, or is taken back, ends what it began.
			ctx, end := context.WithCancelCause(ctx)
			defer end(nil)
			defer a.again(ctx, info.FullMethod, c, end)()
			err = handle(srv, callerStream{stream, ctx})
			if stream.Context().Err() == nil && ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}),
	}
}

// errNarrowed ends a stream whose caller is of fewer tenants than when it began. Clients ask again, and see what is left.
var errNarrowed = status.Error(codes.Unavailable, "the tenants of the token have changed; ask again")

// again looks from time to time whether a call would still be admitted, for all that it was for, and ends it where not.
func (a *Authenticator) again(ctx context.Context, method string, before *Caller, end context.CancelCauseFunc) (stop func()) {
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(recheck)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				// An issuer that does not answer takes nothing back.
				now, err := a.admit(ctx, method)
				if err == nil && !now.covers(before) {
					err = errNarrowed
				} else if status.Code(err) == codes.Unavailable {
					err = nil
				}
				if err != nil && ctx.Err() == nil {
					end(err)
					return
				}
			}
		}
	}()
	return func() { close(done); <-ended }
}

type callerStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s callerStream) Context() context.Context { return s.ctx }

// admit tells who calls a method, or refuses.
func (a *Authenticator) admit(ctx context.Context, method string) (*Caller, error) {
	if open(method) {
		return &Caller{}, nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	tenants := md.Get(TenantKey)
	if len(tenants) > 1 {
		return nil, status.Error(codes.InvalidArgument, TenantKey+" is given more than once")
	}
	tenant := strings.Join(tenants, "")
	if !a.Enabled() {
		subject := mesh.PeerRole(ctx)
		if subject == "" {
			subject = "anonymous"
		}
		return Anonymous(subject, "").ActingFor(tenant)
	}
	c, err := a.Authenticate(ctx, bearer(md), remote(ctx))
	if err != nil {
		return nil, err
	}
	if err := c.May(methods[method]); err != nil {
		return nil, err
	}
	return c.ActingFor(tenant)
}

// bearer is the token of a call; "" for none, and for more than one.
func bearer(md metadata.MD) string {
	values := md.Get("authorization")
	if len(values) != 1 {
		return ""
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

func remote(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	return Host(p.Addr.String())
}

// Host is the host of host:port.
func Host(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

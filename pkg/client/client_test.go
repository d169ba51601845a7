package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server answers from functions that a test sets.
type server struct {
	specqlv1.UnimplementedOrchestratorServiceServer
	mu      sync.Mutex
	execute func(ctx context.Context, r *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error)
	get     func(id string) (*specqlv1.Run, error)
	watch   func(call int, r *specqlv1.WatchRunRequest, s specqlv1.OrchestratorService_WatchRunServer) error
	watches int
}

func (s *server) ExecuteAction(ctx context.Context, r *specqlv1.ExecuteActionRequest) (*specqlv1.ExecuteActionResponse, error) {
	run, err := s.execute(ctx, r)
	if err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	return &specqlv1.ExecuteActionResponse{Run: run}, nil
}

func (s *server) GetRun(_ context.Context, r *specqlv1.GetRunRequest) (*specqlv1.GetRunResponse, error) {
	run, err := s.get(r.GetId())
	if err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	return &specqlv1.GetRunResponse{Run: run}, nil
}

func (s *server) WatchRun(r *specqlv1.WatchRunRequest, stream grpc.ServerStreamingServer[specqlv1.WatchRunResponse]) error {
	s.mu.Lock()
	s.watches++
	n := s.watches
	s.mu.Unlock()
	return s.watch(n, r, stream)
}

func serve(t *testing.T, s *server) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := grpc.NewServer()
	specqlv1.RegisterOrchestratorServiceServer(g, s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(lis) }()
	t.Cleanup(func() { g.Stop(); assert.NoError(t, <-done) })
	return lis.Addr().String()
}

func dial(t *testing.T, s *server, opts ...client.Option) *client.Client {
	t.Helper()
	c, err := client.New(serve(t, s), opts...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

func completed(id string) *specqlv1.Run {
	return &specqlv1.Run{Id: id, Status: specqlv1.Status_STATUS_COMPLETED, Output: structpb.NewStringValue("done")}
}

func TestExecuteAndWait(t *testing.T) {
	var keys []string
	s := &server{execute: func(_ context.Context, r *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error) {
		keys = append(keys, r.GetIdempotencyKey())
		if len(keys) == 1 {
			return nil, fault.New(fault.Unavailable, "starting")
		}
		assert.Equal(t, map[string]any{"amount": 12.0}, r.GetInput().AsMap())
		assert.Positive(t, r.GetWait().AsDuration())
		return completed("r1"), nil
	}}
	input := struct {
		Amount int `json:"amount"`
	}{12}
	run, err := client.Execute(t.Context(), serve(t, s), client.Action{Entity: "payment", Action: "charge", Input: input})
	require.NoError(t, err)
	require.Equal(t, "done", run.GetOutput().AsInterface())
	require.Len(t, keys, 2)
	require.NotEmpty(t, keys[0])
	require.Equal(t, keys[0], keys[1], "the start is sent again with the same key")
}

func TestExecuteAndWaitTellsWhyARunFailed(t *testing.T) {
	failed := &specqlv1.Run{
		Id: "r1", Status: specqlv1.Status_STATUS_FAILED,
		Error: &runnerv1.Error{Code: "REMOTE_ERROR", Message: "the card was declined", Attempts: 3},
	}
	s := &server{
		execute: func(context.Context, *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error) {
			return &specqlv1.Run{Id: "r1", Status: specqlv1.Status_STATUS_RUNNING}, nil
		},
		get: func(string) (*specqlv1.Run, error) { return failed, nil },
		watch: func(_ int, _ *specqlv1.WatchRunRequest, stream specqlv1.OrchestratorService_WatchRunServer) error {
			return stream.Send(&specqlv1.WatchRunResponse{Sequence: 9, Event: &specqlv1.WatchRunResponse_Run{Run: failed}})
		},
	}
	run, err := dial(t, s).ExecuteAndWait(t.Context(), client.Action{Entity: "payment", Action: "charge"})
	require.Equal(t, "r1", run.GetId())
	f, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, fault.RemoteError, f.Code)
	require.Equal(t, 3, f.Attempts)
}

func TestWatchGoesOnAfterABrokenStream(t *testing.T) {
	send := func(stream specqlv1.OrchestratorService_WatchRunServer, seq int64, st specqlv1.Status) {
		assert.NoError(t, stream.Send(&specqlv1.WatchRunResponse{
			Sequence: seq, Event: &specqlv1.WatchRunResponse_Run{Run: &specqlv1.Run{Id: "r1", Status: st}},
		}))
	}
	var after []int64
	s := &server{
		get: func(string) (*specqlv1.Run, error) {
			return &specqlv1.Run{Id: "r1", Status: specqlv1.Status_STATUS_RUNNING}, nil
		},
		watch: func(call int, r *specqlv1.WatchRunRequest, stream specqlv1.OrchestratorService_WatchRunServer) error {
			after = append(after, r.GetAfterSequence())
			assert.True(t, r.GetLogs())
			switch call {
			case 1:
				send(stream, 1, specqlv1.Status_STATUS_PENDING)
				send(stream, 4, specqlv1.Status_STATUS_RUNNING)
				return status.Error(codes.Unavailable, "connection reset")
			case 2:
				return nil // ends without the run's end
			}
			send(stream, 7, specqlv1.Status_STATUS_COMPLETED)
			return nil
		},
	}
	var seen []int64
	err := dial(t, s).Watch(t.Context(), "r1", func(e *client.Event) error {
		seen = append(seen, e.GetSequence())
		return nil
	}, client.WithLogs())
	require.NoError(t, err)
	require.Equal(t, []int64{1, 4, 7}, seen)
	require.Equal(t, []int64{0, 4, 4}, after)
}

func TestWatchOfWhatLiesBehindTheEnd(t *testing.T) {
	s := &server{
		get:   func(id string) (*specqlv1.Run, error) { return completed(id), nil },
		watch: func(int, *specqlv1.WatchRunRequest, specqlv1.OrchestratorService_WatchRunServer) error { return nil },
	}
	err := dial(t, s).Watch(t.Context(), "r1", func(*client.Event) error { return nil }, client.AfterSequence(99))
	require.NoError(t, err)
}

func TestWatchEndsWithItsFunctionAndItsContext(t *testing.T) {
	s := &server{watch: func(_ int, _ *specqlv1.WatchRunRequest, stream specqlv1.OrchestratorService_WatchRunServer) error {
		if err := stream.Send(&specqlv1.WatchRunResponse{Sequence: 1, Event: &specqlv1.WatchRunResponse_Job{Job: &specqlv1.Job{}}}); err != nil {
			return err
		}
		<-stream.Context().Done()
		return stream.Context().Err()
	}}
	c := dial(t, s)
	require.ErrorIs(t, c.Watch(t.Context(), "r1", func(*client.Event) error { return context.Canceled }), context.Canceled)

	ctx, cancel := context.WithCancel(t.Context())
	err := c.Watch(ctx, "r1", func(*client.Event) error { cancel(); return nil })
	f, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, fault.Cancelled, f.Code)
}

func TestWatchGivesUpOnAServerThatStaysAway(t *testing.T) {
	s := &server{watch: func(int, *specqlv1.WatchRunRequest, specqlv1.OrchestratorService_WatchRunServer) error {
		return status.Error(codes.Unavailable, "draining")
	}}
	err := dial(t, s, client.WithPatience(time.Millisecond)).Watch(t.Context(), "r1", func(*client.Event) error { return nil })
	f, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, fault.Unavailable, f.Code)
}

func TestTokenAndTenantReachTheServer(t *testing.T) {
	s := &server{execute: func(ctx context.Context, _ *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		assert.Equal(t, []string{"Bearer secret"}, md.Get("authorization"))
		assert.Equal(t, []string{"acme"}, md.Get(client.TenantHeader))
		return completed("r1"), nil
	}}
	c := dial(t, s, client.WithToken("secret"), client.WithTenant("acme"))
	run, err := c.Execute(t.Context(), client.Action{Entity: "payment", Action: "charge"})
	require.NoError(t, err)
	require.Equal(t, "r1", run.GetId())
}

func TestBadRequests(t *testing.T) {
	for _, address := range []string{"", "127.0.0.1", "http://127.0.0.1:7350", "nonsense"} {
		_, err := client.New(address)
		require.Error(t, err, address)
		require.Equal(t, fault.Validation, fault.From(err).Code, address)
	}
	_, err := client.New("mesh.example.com:7350", client.WithCA(t.TempDir()+"/none.pem"))
	require.ErrorContains(t, err, "CA file")

	c, err := client.New("127.0.0.1:1")
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close()) }()
	for _, input := range []any{[]int{1}, "text", func() {}, 12} {
		_, err = c.Execute(t.Context(), client.Action{Entity: "e", Action: "a", Input: input})
		require.Error(t, err)
		require.Equal(t, fault.Validation, fault.From(err).Code)
	}
	_, err = c.Execute(t.Context(), client.Action{Entity: "e", Action: "a"})
	require.Equal(t, fault.Unavailable, fault.From(err).Code)
	require.ErrorContains(t, err, "127.0.0.1:1")
}

// files writes what an authority issued for a role and returns the files of the certificate,
// its key and the CA.
func files(t *testing.T, a *mesh.Authority, role string) (cert, key, ca string) {
	t.Helper()
	issued, err := a.Issue(role)
	require.NoError(t, err)
	certPEM, keyPEM, caPEM := issued.PEM()
	dir := t.TempDir()
	cert, key, ca = filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "ca")
	for name, text := range map[string][]byte{cert: certPEM, key: keyPEM, ca: caPEM} {
		require.NoError(t, os.WriteFile(name, text, 0o600))
	}
	return cert, key, ca
}

func TestCertificate(t *testing.T) {
	authority, err := mesh.NewAuthority()
	require.NoError(t, err)
	credentials, err := authority.Issue(mesh.RoleOrchestrator)
	require.NoError(t, err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	srv := mesh.NewServer(credentials, mesh.ServerOptions{})
	callers := make(chan string, 1)
	specqlv1.RegisterOrchestratorServiceServer(srv, &server{execute: func(ctx context.Context, _ *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error) {
		callers <- mesh.PeerRole(ctx)
		return &specqlv1.Run{Id: "r1"}, nil
	}})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ctx, lis) }()
	t.Cleanup(func() { cancel(); assert.NoError(t, <-ended) })

	execute := func(opts ...client.Option) error {
		c, err := client.New(lis.Addr().String(), opts...)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_, err = c.Execute(t.Context(), client.Action{Entity: "e", Action: "a"})
		return err
	}
	cert, key, ca := files(t, authority, "client")
	require.NoError(t, execute(client.WithCA(ca), client.WithCertificate(cert, key)))
	require.Equal(t, "client", <-callers)

	require.Error(t, execute(client.WithCA(ca)), "no certificate")
	other, err := mesh.NewAuthority()
	require.NoError(t, err)
	otherCert, otherKey, _ := files(t, other, "client")
	require.Error(t, execute(client.WithCA(ca), client.WithCertificate(otherCert, otherKey)), "a certificate of another CA")
	require.Error(t, execute(), "plaintext")

	for name, opts := range map[string][]client.Option{
		"needs the file of the CA": {client.WithCertificate(cert, key)},
		"needs its key":            {client.WithCA(ca), client.WithCertificate(cert, "")},
		"cannot be used":           {client.WithCA(ca), client.WithCertificate(cert, otherKey)},
	} {
		err := execute(opts...)
		f, ok := fault.As(err)
		require.True(t, ok, "%v", err)
		require.Equal(t, fault.Validation, f.Code)
		require.ErrorContains(t, err, name)
	}
}

// Certificates of one mesh often have names in common, so that the name that is dialled does not tell the
// orchestrator from a neighbour that has taken its place.
func TestATokenIsForTheOrchestratorAlone(t *testing.T) {
	authority, err := mesh.NewAuthority()
	require.NoError(t, err)
	_, _, ca := files(t, authority, mesh.RoleOrchestrator)
	for role, taken := range map[string]bool{mesh.RoleOrchestrator: true, "http-runner": false, "client": false} {
		t.Run(role, func(t *testing.T) {
			credentials, err := authority.Issue(role)
			require.NoError(t, err)
			lis, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			srv := mesh.NewServer(credentials, mesh.ServerOptions{OptionalClientCert: true})
			tokens := make(chan []string, 1)
			specqlv1.RegisterOrchestratorServiceServer(srv, &server{execute: func(ctx context.Context, _ *specqlv1.ExecuteActionRequest) (*specqlv1.Run, error) {
				tokens <- metadata.ValueFromIncomingContext(ctx, "authorization")
				return &specqlv1.Run{Id: "r1"}, nil
			}})
			ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
			ended := make(chan error, 1)
			go func() { ended <- srv.Serve(ctx, lis) }()
			t.Cleanup(func() { cancel(); assert.NoError(t, <-ended) })
			for name, opt := range map[string]client.Option{"ca": client.WithCA(ca), "tls": client.WithTLS(trusting(t, ca))} {
				c, err := client.New(lis.Addr().String(), opt, client.WithToken("secret"))
				require.NoError(t, err)
				t.Cleanup(func() { _ = c.Close() })
				_, err = c.Execute(t.Context(), client.Action{Entity: "e", Action: "a"})
				if taken {
					require.NoError(t, err, name)
					require.Equal(t, []string{"Bearer secret"}, <-tokens)
					continue
				}
				require.ErrorContains(t, err, "the server's certificate says", name)
				require.Empty(t, tokens)
			}
		})
	}
}

func trusting(t *testing.T, ca string) *tls.Config {
	t.Helper()
	pem, err := os.ReadFile(ca)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(pem))
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool}
}

package local

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"

	"github.com/specql/mesh/pkg/mesh"
)

// front stands before a custom runner that speaks plaintext on this machine and gives it a
// certificate of this mesh: the orchestrator speaks mutual TLS with every runner.
type front struct {
	lis    net.Listener
	target string
	logger *slog.Logger
}

func newFront(creds *mesh.Credentials, target string, logger *slog.Logger) (*front, error) {
	if err := mesh.CheckInsecure(target); err != nil {
		return nil, err
	}
	certPEM, keyPEM, caPEM := creds.PEM()
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("the front's certificate: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(caPEM)
	lis, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, NextProtos: []string{"h2"},
	})
	if err != nil {
		return nil, err
	}
	return &front{lis: lis, target: target, logger: logger}, nil
}

// serve forwards connections until ctx ends.
func (f *front) serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = f.lis.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		conn, err := f.lis.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		all.Go(func() { f.forward(ctx, conn) })
	}
}

func (f *front) forward(ctx context.Context, in net.Conn) {
	defer func() { _ = in.Close() }()
	var dialer net.Dialer
	out, err := dialer.DialContext(ctx, "tcp", f.target)
	if err != nil {
		f.logger.DebugContext(ctx, "custom runner not reached", slog.String("address", f.target), slog.Any("error", err))
		return
	}
	stop := context.AfterFunc(ctx, func() { _ = in.Close(); _ = out.Close() })
	defer stop()
	var both sync.WaitGroup
	for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
		both.Go(func() {
			_, _ = io.Copy(pair[0], pair[1])
			_ = pair[0].Close()
			_ = pair[1].Close()
		})
	}
	both.Wait()
}

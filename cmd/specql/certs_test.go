package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/orchestrator/server"
)

// loaded are the credentials that a service reads from the folder.
func loaded(t *testing.T, dir, name string) *mesh.Credentials {
	t.Helper()
	c, err := mesh.LoadCredentials(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"), filepath.Join(dir, "ca.crt"))
	require.NoError(t, err)
	require.Equal(t, name, c.Name())
	return c
}

// serveUntilTheEnd runs a service until the test has ended.
func serveUntilTheEnd(t *testing.T, serve func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx) }()
	t.Cleanup(func() { cancel(); assert.NoError(t, <-ended) })
}

func parseCertificate(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	require.NotNil(t, block)
	cert, err := x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	return cert
}

func TestCerts(t *testing.T) {
	work := t.TempDir()
	dir := filepath.Join(work, "certs")
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		return string(text)
	}
	names := []string{"orchestrator", "http-runner", "shell-runner", "docker-runner", "serverless-runner", "client"}

	r := specql(t, work, "certs", "certs", "--host", "mesh.example.org,10.0.0.7", "--host", "other.example.org")
	require.Equal(t, 0, r.status, r.err)
	require.Empty(t, r.err)
	require.Contains(t, r.out, "made  certs/ca.crt  certs/ca.key\n")
	info, err := os.Stat(dir)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), info.Mode().Perm())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 2*(len(names)+1))
	for _, entry := range entries {
		if info, err := entry.Info(); strings.HasSuffix(entry.Name(), ".key") {
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o600), info.Mode().Perm(), entry.Name())
		}
	}
	for _, name := range names {
		pair := loaded(t, dir, name)
		cert, _, _ := pair.PEM()
		leaf := parseCertificate(t, cert)
		for _, host := range []string{"localhost", "127.0.0.1", "::1", name, "mesh.example.org", "10.0.0.7", "other.example.org"} {
			require.NoError(t, leaf.VerifyHostname(host), "%s %s", name, host)
		}
	}

	t.Run("the services accept them", func(t *testing.T) {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		serveUntilTheEnd(t, func(ctx context.Context) error {
			return runner.Serve(ctx, lis, greeter{}, loaded(t, dir, "shell-runner"), runner.Options{Logger: slog.New(slog.DiscardHandler)})
		})
		describe := func(name string) error {
			conn, err := mesh.Dial(lis.Addr().String(), loaded(t, dir, name), mesh.DialOptions{ServerRole: "shell-runner"})
			require.NoError(t, err)
			defer func() { _ = conn.Close() }()
			_, err = runnerv1.NewRunnerServiceClient(conn).Describe(t.Context(), &runnerv1.DescribeRequest{})
			return err
		}
		require.NoError(t, describe("orchestrator"))
		require.ErrorContains(t, describe("client"), "client may not call this service")
	})

	t.Run("made again", func(t *testing.T) {
		ca, key, client := read("ca.crt"), read("ca.key"), read("client.crt")
		require.NoError(t, os.Remove(filepath.Join(dir, "http-runner.crt")))
		r := specql(t, work, "certs", "certs")
		require.Equal(t, 2, r.status)
		require.Contains(t, r.err, "certs/http-runner.key is there without certs/http-runner.crt")
		require.NoError(t, os.Remove(filepath.Join(dir, "http-runner.key")))
		r = specql(t, work, "certs", "certs")
		require.Equal(t, 0, r.status, r.err)
		require.Contains(t, r.out, "kept  certs/ca.crt")
		require.Contains(t, r.out, "kept  certs/client.crt")
		require.Contains(t, r.out, "made  certs/http-runner.crt")
		require.Contains(t, r.err, "--force")
		require.Equal(t, client, read("client.crt"))
		loaded(t, dir, "http-runner")

		r = specql(t, work, "certs", "certs", "--force")
		require.Equal(t, 0, r.status, r.err)
		require.Equal(t, ca, read("ca.crt"))
		require.Equal(t, key, read("ca.key"))
		require.NotEqual(t, client, read("client.crt"))

		require.NoError(t, os.Remove(filepath.Join(dir, "ca.key")))
		r = specql(t, work, "certs", "certs", "--force")
		require.Equal(t, 2, r.status)
		require.Contains(t, r.err, "certs/ca.crt is there without certs/ca.key")
		require.NoError(t, os.Remove(filepath.Join(dir, "ca.crt")))
		r = specql(t, work, "certs", "certs")
		require.Equal(t, 2, r.status, "certificates of another CA")
		require.Contains(t, r.err, "no CA")
		r = specql(t, work, "certs", "certs", "--force")
		require.Equal(t, 0, r.status, r.err)
		require.NotEqual(t, ca, read("ca.crt"))
	})
}

// The API of an orchestrator that is a service of its own asks for a certificate.
func TestMutualTLS(t *testing.T) {
	dir := t.TempDir()
	r := specql(t, dir, "certs", ".")
	require.Equal(t, 0, r.status, r.err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	credentials := loaded(t, dir, "orchestrator")
	serveUntilTheEnd(t, func(ctx context.Context) error {
		return server.Run(ctx, server.Options{
			Listener: lis, Credentials: credentials, RunnerCredentials: credentials,
			Database: "sqlite:" + filepath.Join(dir, "db"), DrainTimeout: time.Second, Logger: slog.New(slog.DiscardHandler),
		})
	})
	address := lis.Addr().String()
	list := func(flags ...string) result {
		return specql(t, dir, append([]string{"runs", "list", "-o", "json", "--address", address}, flags...)...)
	}
	r = list("--ca", "ca.crt", "--tls-cert", "client.crt", "--tls-key", "client.key")
	require.Equal(t, 0, r.status, r.err)
	cmd := program(t.Context(), dir, "runs", "list", "-o", "json")
	cmd.Env = append(cmd.Env, "SPECQL_ADDRESS="+address, "SPECQL_CA=ca.crt", "SPECQL_TLS_CERT=client.crt", "SPECQL_TLS_KEY=client.key")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))

	other := filepath.Join(dir, "other")
	require.Equal(t, 0, specql(t, dir, "certs", other).status)
	for _, tt := range []struct {
		flags []string
		want  string
	}{
		{nil, "it speaks TLS: give --ca, --tls-cert and --tls-key"},
		{[]string{"--ca", "ca.crt"}, "it asks for a certificate: give --tls-cert and --tls-key next to --ca"},
		{[]string{"--ca", "other/ca.crt"}, "do not go together"},
	} {
		r := list(tt.flags...)
		require.Equal(t, 1, r.status, r.err)
		require.Contains(t, r.err, tt.want)
		require.NotContains(t, r.err, "no server answers")
	}
	for _, flags := range [][]string{{"--tls-cert", "client.crt"}, {"--tls-cert", "client.crt", "--tls-key", "client.key"}, {"--ca", "ca.crt", "--tls-cert", "client.crt", "--tls-key", "ca.key"}} {
		r := list(flags...)
		require.Equal(t, 2, r.status, r.err)
	}

	// The loopback answers at its other addresses, too, which no certificate has.
	elsewhere, err := net.Listen("tcp", "127.0.0.2:0")
	require.NoError(t, err)
	serveUntilTheEnd(t, func(ctx context.Context) error {
		return mesh.NewServer(credentials, mesh.ServerOptions{}).Serve(ctx, elsewhere)
	})
	r = specql(t, dir, "runs", "list", "--address", elsewhere.Addr().String(), "--ca", "ca.crt", "--tls-cert", "client.crt", "--tls-key", "client.key")
	require.Equal(t, 1, r.status, r.err)
	require.Contains(t, r.err, "its certificate has other names than the one in --address")

	plain, _ := dev(t)
	r = specql(t, dir, "runs", "list", "--address", plain, "--ca", "ca.crt")
	require.Equal(t, 1, r.status)
	require.Contains(t, r.err, "it speaks plaintext: leave out --ca")
}

package mesh

import (
	"bytes"
	"crypto/x509"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/telemetry"
)

func TestCredentialsFollowTheirFiles(t *testing.T) {
	t.Parallel()
	a, err := NewAuthority()
	require.NoError(t, err)
	dir := t.TempDir()
	cert, key, ca := filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "ca")
	// Times of files are coarse on some file systems, so each version gets its own.
	stamp := time.Now().Add(-time.Hour)
	write := func(role string) {
		issued, err := a.Issue(role)
		require.NoError(t, err)
		certPEM, keyPEM, caPEM := issued.PEM()
		stamp = stamp.Add(time.Minute)
		for name, text := range map[string][]byte{cert: certPEM, key: keyPEM, ca: caPEM} {
			require.NoError(t, os.WriteFile(name, text, 0o600))
			require.NoError(t, os.Chtimes(name, stamp, stamp))
		}
	}
	write("http-runner")
	c, err := LoadCredentials(cert, key, ca)
	require.NoError(t, err)
	require.Equal(t, "http-runner", c.Name())

	var log bytes.Buffer
	NewServer(c, ServerOptions{Logger: telemetry.NewLogger(&log, "info", "text")})
	write("shell-runner")
	require.Equal(t, "http-runner", c.Name(), "files are not read for every connection")
	c.checked = time.Time{}
	require.Equal(t, "shell-runner", c.Name())

	// A version that cannot be read leaves the last good one, and is tried again.
	require.Equal(t, 1, strings.Count(log.String(), "level=INFO msg=\"the changed certificates are in use\""))
	require.NoError(t, os.WriteFile(key, []byte("half written"), 0o600))
	for range 3 {
		c.checked = time.Time{}
		require.Equal(t, "shell-runner", c.Name())
	}
	require.Equal(t, 1, strings.Count(log.String(), "level=ERROR"), "it is told once")
	require.Contains(t, log.String(), "those of before stay in use")
	require.NotContains(t, log.String(), "half written")
	write("docker-runner")
	c.checked = time.Time{}
	require.Equal(t, "docker-runner", c.Name())
}

func TestRolesOfCertificates(t *testing.T) {
	t.Parallel()
	for role, names := range map[string][]string{
		"http-runner": {"localhost", "http-runner.role.specql.invalid"},
		"":            {"http-runner", "role.specql.invalid", "a.b.role.specql.invalid", "http-runner.role.specql.invalid.example.org", "HTTP.role.specql.invalid", ".role.specql.invalid"},
	} {
		require.Equal(t, role, roleOf(&x509.Certificate{DNSNames: names}))
	}
	uri, err := roleURI("orchestrator")
	require.NoError(t, err)
	require.Equal(t, "orchestrator", roleOf(&x509.Certificate{URIs: []*url.URL{uri}, DNSNames: []string{"http-runner.role.specql.invalid"}}), "the URI goes first")
}

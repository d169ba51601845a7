package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// engine is a client of the machine's Docker engine; the test is skipped where there is none.
func engine(t *testing.T) *http.Client {
	t.Helper()
	network, address := "unix", "/var/run/docker.sock"
	if host := os.Getenv("DOCKER_HOST"); host != "" {
		network, address, _ = strings.Cut(host, "://")
		require.Contains(t, []string{"unix", "tcp"}, network, "DOCKER_HOST is %q; this test reaches an engine at unix:// or tcp://", host)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	c := &http.Client{Transport: transport}
	resp, err := c.Get("http://docker/_ping")
	if err != nil {
		t.Skipf("no Docker engine answers: %v", err)
	}
	require.NoError(t, resp.Body.Close())
	return c
}

// image makes an image of one static Go program of testdata and removes it at the end.
func image(t *testing.T, repo, tag, source string) {
	t.Helper()
	c := engine(t)
	binary := filepath.Join(t.TempDir(), "app")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "./"+source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	raw := read(t, binary)

	var rootfs bytes.Buffer
	w := tar.NewWriter(&rootfs)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(raw))}))
	_, err = io.WriteString(w, raw)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	query := url.Values{"fromSrc": {"-"}, "repo": {repo}, "tag": {tag}, "changes": {`ENTRYPOINT ["/app"]`}}
	resp, err := c.Post("http://docker/images/create?"+query.Encode(), "application/x-tar", &rootfs)
	require.NoError(t, err)
	answer, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s", answer)
	require.NotContains(t, string(answer), `"error"`)
	t.Cleanup(func() {
		req, err := http.NewRequestWithContext(context.WithoutCancel(t.Context()), http.MethodDelete, "http://docker/images/"+repo+":"+tag, nil)
		require.NoError(t, err)
		resp, err := c.Do(req)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
	})
}

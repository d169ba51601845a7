package dockerrunner

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

func TestAllowedImages(t *testing.T) {
	const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	const other = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	here := []string{"docker.io/library/python@" + digest}
	for _, c := range []struct {
		entry, image string
		allowed      bool
	}{
		{"python:3.11-slim", "docker.io/library/python:3.11-slim", true},
		{"docker.io/library/python:3.11-slim", "python:3.11-slim", true},
		{"index.docker.io/library/python:3.11-slim", "python:3.11-slim", true},
		{"python", "python:latest", true},
		{"python", "python:3.12", false},
		{"python:3.11-slim", "python:3.11-slim-evil", false},
		{"python:3.11-slim", "evil.example/python:3.11-slim", false},
		{"python:3.11-slim", "python@" + digest, false},
		{"python:3.11-slim", "python:3.11-slim@" + digest, false},
		{"python:*", "python:3.12", true},
		{"python:*", "python3:3.12", false},
		{"acme/*", "acme/tool:1", true},
		{"acme/*", "docker.io/acme/deep/tool:1", true},
		{"acme/*", "acme-evil/tool:1", false},
		{"ghcr.io/acme/*", "ghcr.io/acme/x@" + digest, true},
		{"ghcr.io/acme/*", "acme/x", false},
		{"python@" + digest, "python:3.11", true},
		{"python@" + digest, "python@" + digest, true},
		{"python@" + other, "python:3.11", false},
		{"python@" + other, "python@" + digest, false},
		{"python:3.11@" + digest, "python:3.12", false},
		{"evil/python@" + digest, "python:3.11", false},
		{"sha256:" + strings.Repeat("c", 64), "python:3.11", true},
		{"sha256:" + strings.Repeat("c", 64), strings.Repeat("c", 64), true},
		{digest, "python:3.11", false},
		{"*", "anything/at:all", true},
	} {
		name, err := parseImage(c.image)
		require.NoError(t, err)
		pattern, err := parsePattern(c.entry)
		require.NoError(t, err)
		require.Equal(t, c.allowed, pattern.matches(name, "sha256:"+strings.Repeat("c", 64), here), "%s allows %s", c.entry, c.image)
	}
	for _, bad := range []string{"", "UPPER", "a/*/b", "/*", "x@sha256:12", "a b", strings.Repeat("a/", 300) + "*"} {
		_, err := parsePattern(bad)
		require.Error(t, err, bad)
	}
}

func TestImagePolicy(t *testing.T) {
	needEngine(t)
	out, message := call{policy: object{"allowed_images": []string{"python:3.11-slim"}}}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, "add \"docker.io/"+shared.image+"\" to allowed_images")
	require.Len(t, out.Finished.GetSecurity().GetChecks(), 1)
	call{policy: object{"allowed_images": []string{}}}.fails(t, "POLICY_VIOLATION")
	repo, _, _ := strings.Cut(shared.image, ":")
	_, message = call{policy: object{"allowed_images": []string{repo + "@sha256:" + strings.Repeat("0", 64)}}}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, "another digest")

	// Runs by its ID and pinned to it.
	found, err := shared.runner.client.ImageInspect(t.Context(), shared.image)
	require.NoError(t, err)
	for _, image := range []string{shared.image, found.ID} {
		out := call{config: object{"image": image}, policy: object{"allowed_images": []string{found.ID}}}.run(t)
		require.Equal(t, object{"program": "probe"}, decoded(t, out))
		require.Equal(t, found.ID, out.Finished.GetUsage().GetExecutedVersion())
	}
}

func TestImageThatIsNotThere(t *testing.T) {
	never := object{"image": "specql-test/absent:1", "pull_policy": "never"}
	_, message := call{config: never}.fails(t, "VALIDATION")
	require.Contains(t, message, "pull_policy is never")
	id := "sha256:" + strings.Repeat("0", 64)
	_, message = call{config: object{"image": id}, policy: object{"allowed_images": []string{id}}}.fails(t, "VALIDATION")
	require.Contains(t, message, "cannot be pulled")

	local := object{"allowed_images": []string{"127.0.0.1:1/*"}}
	out, message := call{config: object{"image": "127.0.0.1:1/x:1"}, policy: local}.fails(t, "UNAVAILABLE")
	require.True(t, out.Finished.GetError().GetRetryable())
	require.Contains(t, message, "127.0.0.1:1")

	auth := object{"image": "127.0.0.1:1/x:1", "registry_auth": object{"username_env_var": "SPECQL_TEST_NO_USER", "password_env_var": "SPECQL_TEST_NO_PASSWORD"}}
	_, message = call{config: auth, policy: local}.fails(t, "VALIDATION")
	require.Contains(t, message, "registry_auth: the environment variable SPECQL_TEST_NO_USER is not set")
}

// registryOf serves one image by the registry's protocol, to a user with a password.
func registryOf(t *testing.T, binary []byte) (host, digest string, pulls *atomic.Int32) {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "probe", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(binary))}))
	_, err := w.Write(binary)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	sum := func(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }
	config := raw(t, object{
		"architecture": "amd64", "os": "linux",
		"config": object{"Entrypoint": []string{"/probe"}, "Volumes": object{"/declared": object{}}},
		"rootfs": object{"type": "layers", "diff_ids": []string{sum(layer.Bytes())}},
	})
	const types = "application/vnd.docker."
	manifest := raw(t, object{
		"schemaVersion": 2, "mediaType": types + "distribution.manifest.v2+json",
		"config": object{"mediaType": types + "container.image.v1+json", "size": len(config), "digest": sum(config)},
		"layers": []object{{"mediaType": types + "image.rootfs.diff.tar", "size": layer.Len(), "digest": sum(layer.Bytes())}},
	})
	pulls = &atomic.Int32{}
	blobs := map[string][]byte{sum(config): config, sum(layer.Bytes()): layer.Bytes()}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "ada" || password != "correct-horse" {
			w.Header().Set("Www-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			_ = json.NewEncoder(w).Encode(object{"errors": []object{{"code": "UNAUTHORIZED", "message": "authentication required"}}})
			return
		}
		last := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		switch {
		case r.URL.Path == "/v2/":
		case strings.HasPrefix(r.URL.Path, "/v2/tool/manifests/") && (last == "1" || last == sum(manifest)):
			pulls.Add(1)
			w.Header().Set("Content-Type", types+"distribution.manifest.v2+json")
			w.Header().Set("Docker-Content-Digest", sum(manifest))
			_, _ = w.Write(manifest)
		case blobs[last] != nil:
			_, _ = w.Write(blobs[last])
		default:
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(object{"errors": []object{{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}}})
		}
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), sum(manifest), pulls
}

func TestPullFromARegistry(t *testing.T) {
	needEngine(t)
	host, digest, pulls := registryOf(t, shared.binary)
	t.Setenv("SPECQL_TEST_REGISTRY_USER", "ada")
	t.Setenv("SPECQL_TEST_REGISTRY_PASSWORD", "correct-horse")
	auth := object{"username_env_var": "SPECQL_TEST_REGISTRY_USER", "password_env_var": "SPECQL_TEST_REGISTRY_PASSWORD"}
	everything := object{"allowed_images": []string{host + "/*"}}
	image := host + "/tool:1"
	t.Cleanup(func() { require.NoError(t, imagebuild.Remove(cleanup(t), "", image)) })

	_, message := call{config: object{"image": image}, policy: everything}.fails(t, "VALIDATION")
	require.Contains(t, message, "registry_auth")
	_, message = call{config: object{"image": host + "/absent:1", "registry_auth": auth}, policy: everything}.fails(t, "VALIDATION")
	require.Contains(t, message, "has no image")

	// An image whose digest is not the pinned one is pulled, and not run.
	_, message = call{
		config: object{"image": image, "registry_auth": auth},
		policy: object{"allowed_images": []string{host + "/tool@sha256:" + strings.Repeat("1", 64)}},
	}.fails(t, "POLICY_VIOLATION")
	require.Contains(t, message, "another digest")

	// The image's own volume is bounded as well, and the password is nowhere.
	pinned := object{"allowed_images": []string{host + "/tool@" + digest}}
	out := call{args: []string{"fill", "/declared/full"}, config: object{"image": image, "registry_auth": auth, "pull_policy": "always"}, policy: pinned}.run(t)
	require.LessOrEqual(t, decoded(t, out)["bytes"], float64(defaultTmpfs))
	require.Contains(t, out.Lines("runner"), "pulled "+image)
	require.NotContains(t, out.Finished.String(), "correct-horse")

	before := pulls.Load()
	call{config: object{"image": image}, policy: pinned}.output(t)
	call{config: object{"image": host + "/tool@" + digest}, policy: pinned}.output(t)
	require.Equal(t, before, pulls.Load(), "it is there already")
	call{config: object{"image": image, "registry_auth": auth, "pull_policy": "always"}, policy: pinned}.output(t)
	require.Greater(t, pulls.Load(), before)
}

func TestImageBuild(t *testing.T) {
	needEngine(t)
	tag := "specql-test/build:" + randomName()
	t.Cleanup(func() { require.NoError(t, imagebuild.Remove(cleanup(t), "", tag)) })
	files := map[string][]byte{"/opt/bin/probe": shared.binary, "/etc/message": []byte("hello")}
	require.NoError(t, imagebuild.FromBinary(t.Context(), "", tag, files, []string{"/opt/bin/probe"}))
	require.Equal(t, object{"text": "hello"}, call{args: []string{"read", "/etc/message"}, config: object{"image": tag, "user": "1234"}}.output(t))
	first, err := shared.runner.client.ImageInspect(t.Context(), tag)
	require.NoError(t, err)
	require.NoError(t, imagebuild.FromBinary(t.Context(), "", tag, map[string][]byte{"/x": shared.binary}, nil))
	_, err = shared.runner.client.ImageInspect(t.Context(), first.ID)
	require.Error(t, err, "the image that lost its tag is gone")
	_, message := call{config: object{"image": tag}}.fails(t, "VALIDATION")
	require.Contains(t, message, "names no program")

	require.ErrorContains(t, imagebuild.FromBinary(t.Context(), "", tag, map[string][]byte{"relative": nil}, nil), "absolute path")
	require.Error(t, imagebuild.FromBinary(t.Context(), "", "NOT AN IMAGE", files, nil))
	require.Error(t, imagebuild.FromBinary(t.Context(), "unix:///no/such/socket", tag, files, nil))
}

// Whoever looks for a tag while it moves finds an image.
func TestImageBuildMovesTheTagAtOnce(t *testing.T) {
	needEngine(t)
	tag := "specql-test/move:" + randomName()
	t.Cleanup(func() { require.NoError(t, imagebuild.Remove(cleanup(t), "", tag)) })
	build := func(text string) error {
		return imagebuild.FromBinary(t.Context(), "", tag, map[string][]byte{"/message": []byte(text)}, []string{"/x"})
	}
	require.NoError(t, build("first"))
	ctx, stop := context.WithCancel(t.Context())
	var watching, building sync.WaitGroup
	var missing, looks atomic.Int32
	watching.Go(func() {
		for ctx.Err() == nil {
			if _, err := shared.runner.client.ImageInspect(ctx, tag); err != nil && ctx.Err() == nil {
				missing.Add(1)
			}
			looks.Add(1)
		}
	})
	errs := make([]error, 3)
	for i := range errs {
		building.Go(func() { errs[i] = build(fmt.Sprint(i)) })
	}
	building.Wait()
	stop()
	watching.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	require.Zero(t, missing.Load())
	require.Positive(t, looks.Load())
}

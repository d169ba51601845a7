// Package imagebuild makes small images on a Docker engine without a registry: for tests, and
// for the demo.
package imagebuild

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/moby/moby/client"
)

// FromBinary makes an image that holds just these files and tags it. The keys of files are
// absolute paths in the image; a file is executable (0755) where it begins like a program or a
// script, else 0644. entrypoint is what a container runs. An empty host means the one of the
// environment (DOCKER_HOST), else the default socket. The tag moves in one step once the image
// is there; the image that had it before is removed, unless something else still uses it.
func FromBinary(ctx context.Context, host, tag string, files map[string][]byte, entrypoint []string) error {
	rootfs, err := pack(files)
	if err != nil {
		return err
	}
	changes := []string(nil)
	if len(entrypoint) > 0 {
		raw, err := json.Marshal(entrypoint)
		if err != nil {
			return fmt.Errorf("entrypoint: %w", err)
		}
		changes = append(changes, "ENTRYPOINT "+string(raw))
	}
	cli, err := newClient(host)
	if err != nil {
		return err
	}
	defer func() { _ = cli.Close() }()
	id, err := load(ctx, cli, rootfs, changes)
	if err != nil {
		return fmt.Errorf("import image %s: %w", tag, err)
	}
	// The tag moves in one step: whoever looks for it meanwhile finds the old image or the new one.
	before, beforeErr := cli.ImageInspect(ctx, tag)
	if _, err := cli.ImageTag(ctx, client.ImageTagOptions{Source: id, Target: tag}); err != nil {
		removeUnnamed(ctx, cli, id)
		return fmt.Errorf("tag image %s: %w", tag, err)
	}
	if beforeErr == nil && before.ID != id {
		removeUnnamed(ctx, cli, before.ID)
	}
	// Another one that builds at the same time may have taken the tag already, and does not
	// know of this image.
	if now, err := cli.ImageInspect(ctx, tag); err == nil && now.ID != id {
		removeUnnamed(ctx, cli, id)
	}
	return nil
}

// load imports a root file system without a name and gives the image's ID.
func load(ctx context.Context, cli *client.Client, rootfs []byte, changes []string) (string, error) {
	response, err := cli.ImageImport(ctx, client.ImageImportSource{Source: bytes.NewReader(rootfs), SourceName: "-"}, "", client.ImageImportOptions{Changes: changes})
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Close() }()
	// The status is sent before the work is done; the messages tell how it ended, the last one the ID.
	messages := json.NewDecoder(response)
	id := ""
	for {
		var message struct {
			Status string `json:"status"`
			Error  string `json:"error"`
		}
		err := messages.Decode(&message)
		switch {
		case errors.Is(err, io.EOF) && id != "":
			return id, nil
		case errors.Is(err, io.EOF):
			return "", errors.New("the engine does not name the image")
		case err != nil:
			return "", err
		case message.Error != "":
			return "", errors.New(message.Error)
		case strings.HasPrefix(message.Status, "sha256:"):
			id = message.Status
		}
	}
}

// removeUnnamed removes an image that has no name any more. One that a container uses stays.
func removeUnnamed(ctx context.Context, cli *client.Client, id string) {
	now, err := cli.ImageInspect(ctx, id)
	if err != nil || len(now.RepoTags)+len(now.RepoDigests) > 0 {
		return
	}
	_, _ = cli.ImageRemove(ctx, id, client.ImageRemoveOptions{PruneChildren: true}) // a leftover does no harm
}

// Remove takes a tag away, and its image where nothing else uses it. None is no error.
func Remove(ctx context.Context, host, tag string) error {
	cli, err := newClient(host)
	if err != nil {
		return err
	}
	defer func() { _ = cli.Close() }()
	if _, err := cli.ImageRemove(ctx, tag, client.ImageRemoveOptions{PruneChildren: true}); err != nil && !strings.Contains(err.Error(), "No such image") {
		return fmt.Errorf("remove image %s: %w", tag, err)
	}
	return nil
}

func newClient(host string) (*client.Client, error) {
	opts := []client.Opt{client.FromEnv}
	if host != "" {
		opts = []client.Opt{client.WithHost(host), client.WithTLSClientConfigFromEnv()}
	}
	cli, err := client.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("docker engine address: %w", err)
	}
	return cli, nil
}

// pack makes the tar of a root file system; the same files give the same bytes.
func pack(files map[string][]byte) ([]byte, error) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	made := map[string]bool{"/": true}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !path.IsAbs(name) || path.Clean(name) != name || name == "/" {
			return nil, fmt.Errorf("file %q of the image: not an absolute path", name)
		}
		if err := packDirs(w, path.Dir(name), made); err != nil {
			return nil, err
		}
		mode := int64(0o644)
		if data := files[name]; bytes.HasPrefix(data, []byte("\x7fELF")) || bytes.HasPrefix(data, []byte("#!")) {
			mode = 0o755
		}
		if err := w.WriteHeader(&tar.Header{Name: name[1:], Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(files[name]))}); err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
		if _, err := w.Write(files[name]); err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("pack image: %w", err)
	}
	return archive.Bytes(), nil
}

func packDirs(w *tar.Writer, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	if err := packDirs(w, path.Dir(dir), made); err != nil {
		return err
	}
	made[dir] = true
	if err := w.WriteHeader(&tar.Header{Name: dir[1:] + "/", Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
		return fmt.Errorf("pack %s: %w", dir, err)
	}
	return nil
}

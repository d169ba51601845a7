package dockerrunner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/client"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// image is an image that is on the engine.
type image struct {
	id string
	// digests are the names with digests that it was pulled by.
	digests []string
	// volumes are the paths that its maker declared as volumes.
	volumes []string
	// runs says whether it has a program to run when nobody names one.
	runs bool
	// entrypoint is what runs before the arguments.
	entrypoint []string
	// workingDir is where it runs when nobody says.
	workingDir string
}

// resolveImage finds the image on the engine and pulls it where pull_policy says.
func (r *Runner) resolveImage(ctx context.Context, name imageName, cfg *Config, sink runner.Sink) (image, error) {
	policy := cfg.pullPolicy()
	if policy != pullAlways || name.repo == "" {
		img, err := r.inspectImage(ctx, name)
		if err == nil || !cerrdefs.IsNotFound(err) {
			return img, err
		}
		switch {
		case name.repo == "":
			return image{}, fault.Wrap(err, fault.Validation, "no image on the engine has the ID %s, and an ID cannot be pulled; name the image by a tag or digest", name)
		case policy == pullNever:
			return image{}, fault.Wrap(err, fault.Validation, "the image %s is not on the engine and pull_policy is never; build or load it there, or set pull_policy: if_not_present", name)
		}
	}
	if err := r.pull(ctx, name, cfg.RegistryAuth, sink); err != nil {
		return image{}, err
	}
	return r.inspectImage(ctx, name)
}

func (r *Runner) inspectImage(ctx context.Context, name imageName) (image, error) {
	found, err := r.client.ImageInspect(ctx, name.String())
	if cerrdefs.IsNotFound(err) {
		return image{}, fmt.Errorf("inspect image: %w", err)
	}
	if err != nil {
		return image{}, engineFault(err, "look up the image "+name.String())
	}
	img := image{id: found.ID, digests: found.RepoDigests}
	if found.Os != "" && found.Os != "linux" {
		return image{}, fault.New(fault.Validation, "the image %s is made for %s; only Linux images run here", name, clip(found.Os))
	}
	if found.Config != nil {
		for path := range found.Config.Volumes {
			img.volumes = append(img.volumes, path)
		}
		img.entrypoint, img.workingDir = found.Config.Entrypoint, found.Config.WorkingDir
		img.runs = len(found.Config.Cmd)+len(found.Config.Entrypoint) > 0
	}
	return img, nil
}

func (r *Runner) pull(ctx context.Context, name imageName, auth *RegistryAuth, sink runner.Sink) error {
	var header string
	var secrets []string
	if auth != nil {
		credentials := registry.AuthConfig{ServerAddress: name.registry()}
		var err error
		if credentials.Username, err = runner.ResolveSecret(sink, auth.UsernameEnvVar); err != nil {
			return at("registry_auth", err)
		}
		if credentials.Password, err = runner.ResolveSecret(sink, auth.PasswordEnvVar); err != nil {
			return at("registry_auth", err)
		}
		secrets = append(runner.SecretForms(credentials.Password), runner.SecretForms(credentials.Username)...)
		if header, err = authconfig.Encode(credentials); err != nil {
			return fault.Wrap(err, fault.Validation, "the credentials of registry_auth cannot be sent")
		}
	}
	sink.Log("runner", "pulling "+name.String())
	response, err := r.client.ImagePull(ctx, name.String(), client.ImagePullOptions{RegistryAuth: header})
	if err != nil {
		return pullFault(ctx, name, err, secrets)
	}
	defer func() { _ = response.Close() }()
	if err := response.Wait(ctx); err != nil {
		return pullFault(ctx, name, err, secrets)
	}
	sink.Log("runner", "pulled "+name.String())
	return nil
}

// pullFault tells a name that is wrong, which stays so, from a registry that is away. Many
// engines report both with the same status, so the registry's own words decide. Those may
// hold the credentials that it was given: what is cut off a text is masked before, since nobody
// recognises half a secret.
func pullFault(ctx context.Context, name imageName, err error, secrets []string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	text, said := strings.ToLower(err.Error()), clip(maskAll(err.Error(), secrets))
	has := func(parts ...string) bool {
		for _, part := range parts {
			if strings.Contains(text, part) {
				return true
			}
		}
		return false
	}
	var network net.Error
	switch {
	case client.IsErrConnectionFailed(err), errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &network):
		return unavailable(err)
	case has("toomanyrequests", "too many requests", "rate limit"):
		return fault.Wrap(err, fault.RateLimited, "the registry %s limits how often images are pulled: %s", name.registry(), said)
	case has("no such host", "i/o timeout", "connection refused", "connection reset", "tls handshake", "network is unreachable", "server misbehaving", "deadline exceeded", "client.timeout"):
		return fault.Wrap(err, fault.Unavailable, "the registry %s could not be reached to pull %s: %s", name.registry(), name, said)
	case has("unauthorized", "authentication required", "access denied", "access forbidden", "denied:", "no basic auth", "incorrect username or password"):
		return fault.Wrap(err, fault.Validation, "the registry %s does not give %s to this user; check the name and registry_auth: %s", name.registry(), name, said)
	case cerrdefs.IsNotFound(err), has("manifest unknown", "not found", "name unknown", "does not exist", "no matching manifest"):
		return fault.Wrap(err, fault.Validation, "the registry %s has no image %s; check runner_config.image: %s", name.registry(), name, said)
	default:
		return fault.Wrap(err, fault.Unavailable, "the image %s could not be pulled: %s", name, said)
	}
}

// maskAll makes secrets unreadable, the longest first: one may be a part of another.
func maskAll(text string, secrets []string) string {
	secrets = slices.Clone(secrets)
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	for _, secret := range secrets {
		text = strings.ReplaceAll(text, secret, "***")
	}
	return text
}

package dockerrunner

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// imageName is an image as a user names it, in normal form.
type imageName struct {
	// repo such as docker.io/library/python; empty for an image ID.
	repo string
	// tag is empty where a digest or an ID names the image.
	tag string
	// digest of the manifest, or the image ID where repo is empty.
	digest digest.Digest
}

var bareID = regexp.MustCompile(`^[0-9a-f]{64}$`)

func parseImage(text string) (imageName, error) {
	if bareID.MatchString(text) {
		text = "sha256:" + text
	}
	if strings.HasPrefix(text, "sha256:") {
		d, err := digest.Parse(text)
		if err != nil {
			return imageName{}, errors.New("an image ID is sha256: and 64 hexadecimal digits")
		}
		return imageName{digest: d}, nil
	}
	named, err := reference.ParseNormalizedNamed(text)
	if err != nil {
		return imageName{}, fmt.Errorf("parse: %w", err)
	}
	name := imageName{repo: named.Name()}
	if digested, ok := named.(reference.Digested); ok {
		// As the engine does: beside a digest a tag has no say.
		name.digest = digested.Digest()
		return name, nil
	}
	name.tag = "latest"
	if tagged, ok := named.(reference.Tagged); ok {
		name.tag = tagged.Tag()
	}
	return name, nil
}

// String gives the full name that the engine takes.
func (n imageName) String() string {
	switch {
	case n.repo == "":
		return n.digest.String()
	case n.digest != "":
		return n.repo + "@" + n.digest.String()
	default:
		return n.repo + ":" + n.tag
	}
}

// registry is the host of the image, in the form that credentials are kept under.
func (n imageName) registry() string {
	host, _, _ := strings.Cut(n.repo, "/")
	return host
}

// imagePattern is an entry of allowed_images.
type imagePattern struct {
	text string
	// any matches every image.
	any bool
	// below is a prefix of repositories with its last slash; empty for an exact one.
	below string
	name  imageName
	// anyTag: repo:*
	anyTag bool
}

func parsePattern(text string) (imagePattern, error) {
	p := imagePattern{text: text}
	if text == "*" {
		p.any = true
		return p, nil
	}
	if prefix, ok := strings.CutSuffix(text, "/*"); ok {
		named, err := reference.ParseNormalizedNamed(prefix + "/x")
		if err != nil {
			return p, fmt.Errorf("parse: %w", err)
		}
		p.below = strings.TrimSuffix(named.Name(), "x")
		return p, nil
	}
	text, p.anyTag = strings.CutSuffix(text, ":*")
	if strings.Contains(text, "*") {
		return p, errors.New("a * stands only at the end, as repo/* or repo:*")
	}
	if pinned, err := reference.ParseNormalizedNamed(text); err == nil {
		if d, ok := pinned.(reference.Digested); ok {
			p.name = imageName{repo: pinned.Name(), digest: d.Digest()}
			if tagged, ok := pinned.(reference.Tagged); ok {
				p.name.tag = tagged.Tag()
			}
			return p, nil
		}
	}
	var err error
	p.name, err = parseImage(text)
	return p, err
}

// pinned says whether only the content decides, which is known once the image is here.
func (p imagePattern) pinned() bool { return p.name.digest != "" }

// mayMatch compares names alone: what is false here can never be allowed by this entry.
func (p imagePattern) mayMatch(n imageName) bool {
	switch {
	case p.any:
		return true
	case p.below != "":
		return strings.HasPrefix(n.repo, p.below)
	case p.name.repo == "": // an image ID, whatever its name
		return n.repo != "" || n.digest == p.name.digest
	case p.anyTag:
		return n.repo == p.name.repo
	case p.pinned():
		if n.repo != p.name.repo {
			return false
		}
		if n.digest != "" {
			return n.digest == p.name.digest
		}
		return p.name.tag == "" || p.name.tag == n.tag
	default:
		return n.repo == p.name.repo && n.tag == p.name.tag && n.digest == ""
	}
}

// matches also compares what the name stands for on the engine.
func (p imagePattern) matches(n imageName, id string, repoDigests []string) bool {
	if !p.mayMatch(n) {
		return false
	}
	if !p.pinned() {
		return true
	}
	if id == p.name.digest.String() {
		return true
	}
	return p.name.repo != "" && slices.ContainsFunc(repoDigests, func(text string) bool {
		named, err := reference.ParseNormalizedNamed(text)
		if err != nil {
			return false
		}
		d, ok := named.(reference.Digested)
		return ok && d.Digest() == p.name.digest && named.Name() == p.name.repo
	})
}

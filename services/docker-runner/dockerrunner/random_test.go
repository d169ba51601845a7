package dockerrunner

import (
	"encoding/json"
	"math/rand/v2"
	"testing"

	"github.com/specql/mesh/pkg/runner"
)

// TestRandomChangesOfConfiguration: whatever the registry says, checking it does not panic, and
// what comes through the checks can be turned into mounts.
func TestRandomChangesOfConfiguration(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same changes each time
	change := func(text string) string {
		b := []byte(text)
		for range random.IntN(3) {
			b[random.IntN(len(b))] = " \"{}[]:,/.*@$0aZ\x00\xff"[random.IntN(18)]
		}
		return string(b)
	}
	for range 1000 {
		tryConfiguration(t,
			change(`{"image":"python:3.11-slim","network_mode":"x","user":"a","created_ahead":3,"tmpfs":["/x:size=64m,exec"],"volumes":[{"host_path":"/a/b","container_path":"/b/c"}]}`),
			change(`{"allowed_images":["acme/*","python:*"],"allowed_networks":["x"],"volume_restrictions":{"allowed_host_paths":["/a"]},"resource_limits":{"disk_mb":3}}`),
			change(`$input.a[0].b`), change(`{"a":[{"b":1}]}`))
	}
}

func tryConfiguration(t *testing.T, config, policy, arg, input string) {
	t.Helper()
	cfg, err := runner.Decode[Config](json.RawMessage(config))
	if err != nil {
		return
	}
	p, err := runner.Decode[Policy](json.RawMessage(policy))
	if err != nil {
		return
	}
	_, _ = fillArguments([]string{arg}, json.RawMessage(input))
	_, _ = streamOutput([]byte(input), arg, 0)
	problems := append(cfg.check(nil), p.check(nil)...)
	both := newPolicies(p, &p, nil, &runner.Checks{})
	if name, err := parseImage(cfg.Image); err == nil {
		_ = both.imageName(name)
		_ = both.imageContent(name, "sha256:x", []string{"docker.io/x@sha256:y", cfg.Image})
	}
	_ = both.network(cfg.network())
	for _, problem := range problems {
		if !problem.Warning {
			return
		}
	}
	a := &attempt{cfg: cfg, limits: both.limits(), job: &runner.Job{}}
	mounts, err := both.volumes(cfg.Volumes, byName)
	if err != nil {
		return
	}
	for _, m := range mounts {
		if deniedPaths(nil).why(m.source) != "" || systemTarget(m.target) {
			t.Fatalf("mounts %+v", m)
		}
	}
	_ = a.mounts(mounts)
	_, _ = a.tmpfs(image{volumes: []string{arg}}, mounts)
}

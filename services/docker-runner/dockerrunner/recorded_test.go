package dockerrunner

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// TestCheck: what a policy says of containers of the past, without an engine, and what would allow them.
func TestCheck(t *testing.T) {
	t.Parallel()
	id := "sha256:" + strings.Repeat("a", 64)
	for name, c := range map[string]struct {
		policy, config string
		usage          *runnerv1.ResourceUsage
		code           fault.Code
		rule, change   string
		unknown        string
	}{
		"allowed":         {policy: `{"allowed_images": ["alpine:3"]}`, config: `{"image": "alpine:3"}`},
		"another image":   {policy: `{"allowed_images": ["busybox:1"]}`, config: `{"image": "alpine:3"}`, code: fault.PolicyViolation, rule: "allowed_images", change: "docker.io/library/alpine:3"},
		"by its contents": {policy: `{"allowed_images": ["` + id + `"]}`, config: `{"image": "alpine:3"}`, usage: &runnerv1.ResourceUsage{ExecutedVersion: &id}},
		"by a registry's digest": {
			policy: `{"allowed_images": ["alpine@` + id + `"]}`, config: `{"image": "alpine:3"}`, usage: &runnerv1.ResourceUsage{ExecutedVersion: new("sha256:" + strings.Repeat("b", 64))},
			unknown: "the digest that a registry knows the image by",
		},
		"a network": {
			policy: `{"allowed_images": ["alpine:3"]}`, config: `{"image": "alpine:3", "network_mode": "bridge"}`, code: fault.PolicyViolation, rule: "allowed_networks", change: "bridge",
		},
		"a path": {
			policy: `{"allowed_images": ["alpine:3"], "volume_restrictions": {"allowed_host_paths": ["/data"]}}`,
			config: `{"image": "alpine:3", "volumes": [{"host_path": "/opt/x", "container_path": "/x"}]}`,
			code:   fault.PolicyViolation, rule: "volume_restrictions.allowed_host_paths", change: "/opt/x", unknown: "what links in the paths led to",
		},
		"memory": {
			policy: `{"allowed_images": ["alpine:3"], "resource_limits": {"memory_mb": 64}}`, config: `{"image": "alpine:3"}`,
			usage: &runnerv1.ResourceUsage{PeakMemoryMb: new(100.0)}, code: fault.ResourceExceeded, rule: "resource_limits.memory_mb", change: "100",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &Runner{}
			job := &runner.RecordedJob{Usage: &runnerv1.ResourceUsage{}}
			if c.usage != nil {
				job.Usage = c.usage
			}
			job.Service = runner.Service{Name: "box", ExecutionType: "docker", Policy: json.RawMessage(c.policy), Config: json.RawMessage(c.config)}
			job.Operation, job.Input = runner.Operation{Name: "run", Config: json.RawMessage(`{}`)}, json.RawMessage(`{}`)
			res, err := r.Check(t.Context(), job)
			require.NoError(t, err)
			require.Contains(t, strings.Join(res.Unknown, "\n"), c.unknown)
			if c.code == "" {
				require.NoError(t, res.Err)
				return
			}
			require.Equal(t, c.code, fault.From(res.Err).Code, res.Err)
			denied := res.Checks[len(res.Checks)-1]
			require.Equal(t, c.rule, denied.GetRule())
			require.Len(t, denied.GetAllowedBy(), 1)
			change := denied.GetAllowedBy()[0]
			value := change.GetSet()
			if len(change.GetAdd()) > 0 {
				value = change.GetAdd()[0]
			}
			raw, err := value.MarshalJSON()
			require.NoError(t, err)
			require.Equal(t, c.change, strings.Trim(string(raw), `"`))
		})
	}
}

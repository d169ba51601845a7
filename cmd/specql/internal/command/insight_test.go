package command

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// TestPolicyChanges: what the runners say is read as they write it.
func TestPolicyChanges(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ rule, attempted, detail, want string }{
		{"allowed_commands", "/usr/bin/ls", `it is not listed; add "/usr/bin/ls"`, `add "/usr/bin/ls" to allowed_commands`},
		{"allowed_commands", "/srv/job.py", `none of them is an interpreter of .py files; add "/usr/bin/python3"`, `add "/usr/bin/python3" to allowed_commands`},
		{"ceiling.allowed_commands", "/bin/ls", `it is not listed; add "/bin/ls"`, `add "/bin/ls" to allowed_commands, in the runner's --policy file`},
		{"allowed_commands", "ls", "no command of this name is allowed; add the absolute path of ls", ""},
		{"working_directory_restrictions", "/srv", `it is below none of /tmp; add "/srv"`, `add "/srv" to working_directory_restrictions`},
		{"allowed_domains", "b.example", `allowed is a.example; add "b.example" to allowed_domains of security_policy`, `add "b.example" to allowed_domains`},
		{"allowed_domains", "b.example", "without allowed_domains only the service's own host a.example may be called; list both in security_policy.allowed_domains", `add "a.example", "b.example" to allowed_domains`},
		{"allowed_domains", "b.example", `allowed is a.example; add "b.example" to allowed_domains of the runner's own policy (--policy)`, `add "b.example" to allowed_domains, in the runner's --policy file`},
		{"allowed_ports", "a.example:8080", "allowed is 443; add 8080 to allowed_ports of security_policy", "add 8080 to allowed_ports"},
		{"allow_private_networks", "a at 10.0.0.1", "it is private; if the service is meant to be reached there, set allow_private_networks: true in security_policy", "set allow_private_networks: true"},
		{"allow_private_networks", "a at 169.254.169.254", "it is a metadata address, which no policy allows", ""},
		{"max_request_size", "70000 bytes", "at most 65536 bytes of body and query string may be sent; raise max_request_size (4194304 at most) or send less", "set max_request_size: 70000"},
		{"max_response_size", "more than 70000 bytes", "at most 65536 bytes are read; raise max_response_size", ""},
		{"allowed_images", "alpine:3", `the image is not listed; add "alpine:3" to allowed_images of the service's security_policy`, `add "alpine:3" to allowed_images`},
		{"ceiling.allowed_images", "alpine:3", `the image is not listed; add "alpine:3" to allowed_images of the runner's --policy file`, `add "alpine:3" to allowed_images, in the runner's --policy file`},
		{"allowed_images", "alpine:3", "the image on the engine has another digest than the one pinned in the service's security_policy; pull the pinned one, or change the pin", ""},
		{"volumes", "/home/a", `it lies in a home directory, which must be listed; add volume_restrictions with allowed_host_paths: ["/home/a"] to the service's security_policy`, `add "/home/a" to volume_restrictions.allowed_host_paths`},
		{"volume_restrictions.allowed_host_paths", "/srv", `the path is not listed; add "/srv" to allowed_host_paths of the service's security_policy`, `add "/srv" to volume_restrictions.allowed_host_paths`},
		{"volume_restrictions.max_volumes", "3 volumes", "the service's security_policy allows 2; raise max_volumes", "set volume_restrictions.max_volumes: 3"},
		{"allowed_regions", "eu-west-1", `the service's security_policy allows us-east-1; add "eu-west-1"`, `add "eu-west-1" to allowed_regions`},
		{"resource_limits.memory_mb", "512 MB", "the service's security_policy allows 256 MB; lower memory_mb or raise the limit", ""},
		{"", "", "forbidden", ""},
	} {
		c := changeOf(tt.rule, tt.attempted, tt.detail)
		if tt.want == "" {
			require.Nil(t, c, tt.detail)
			continue
		}
		require.NotNil(t, c, tt.detail)
		require.Equal(t, tt.want, c.text(), tt.detail)
	}
}

func structOf(t *testing.T, m map[string]any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(m)
	require.NoError(t, err)
	return s
}

func TestAudit(t *testing.T) {
	t.Parallel()
	at := func(minute int) *timestamppb.Timestamp { return timestamppb.New(time.Unix(int64(minute)*60, 0)) }
	list := []*specqlv1.SecurityViolation{
		{Operation: "a", Rule: "allowed_commands", Attempted: "/bin/ls", Detail: `add "/bin/ls"`, OccurredAt: at(9), Subject: "ann", RunId: "r9"},
		{Operation: "b", Rule: "max_request_size", Attempted: "900 bytes", Detail: "raise max_request_size", OccurredAt: at(8)},
		{Operation: "a", Rule: "allowed_commands", Attempted: "/bin/ls", Detail: `add "/bin/ls"`, OccurredAt: at(7), Subject: "bob", RunId: "r7"},
		{Operation: "b", Rule: "max_request_size", Attempted: "700 bytes", Detail: "raise max_request_size", OccurredAt: at(6)},
		{Operation: "c", Rule: "ceiling.allowed_commands", Attempted: "/bin/rm", Detail: `add "/bin/rm"`, OccurredAt: at(5)},
	}
	found := audit(list)
	require.Len(t, found, 4)
	require.Equal(t, []any{"a", 2, []string{"ann", "bob"}, "r9", int64(7 * 60), int64(9 * 60)},
		[]any{found[0].operation, found[0].count, found[0].subjects, found[0].lastRun, found[0].first.Unix(), found[0].last.Unix()})
	s := &specqlv1.ServiceInfo{Name: "sh: x", SecurityPolicy: structOf(t, map[string]any{"allowed_commands": []any{"/bin/cat"}})}
	require.Equal(t, strings.Split(`services:
  - name: "sh: x"
    security_policy:
      allowed_commands: ["/bin/cat", "/bin/ls"]
      max_request_size: 900`, "\n"), auditChanges(s, found).yaml(s.GetName()))
}

func TestCheckResources(t *testing.T) {
	t.Parallel()
	service := &specqlv1.ServiceInfo{
		Name: "sh", ExecutionType: "shell", Operations: []*specqlv1.OperationInfo{{Name: "a"}, {Name: "b"}},
		SecurityPolicy: structOf(t, map[string]any{"resource_limits": map[string]any{"memory_mb": 64, "timeout_seconds": 10, "cpu_seconds": 100}}),
	}
	figures := func(samples int64, most float64) *specqlv1.Distribution {
		return &specqlv1.Distribution{Samples: samples, P50: new(most / 2), P95: new(most), P99: new(most), Max: &most}
	}
	usage := &specqlv1.UsageSummary{
		Operation: "a", MeasuredJobs: 100, OomKilledJobs: 2, PeakMemoryMb: figures(100, 63.5), CpuUsagePercent: figures(100, 90),
		CpuSeconds: figures(29, 1), DurationSeconds: figures(100, 1.2),
	}
	r := checkResources(service, &specqlv1.GetResourceUsageResponse{Usage: []*specqlv1.UsageSummary{usage}}, nil)
	require.Equal(t, map[string]float64{
		"security_policy.resource_limits.memory_mb":       128, // what was ended would have used more
		"security_policy.resource_limits.cpu_cores":       1.25,
		"security_policy.resource_limits.timeout_seconds": 3,
	}, r.suggested)
	notes := strings.Join(r.notes, "\n")
	require.Contains(t, notes, "memory_mb: the limit ended 2 calls")
	require.Contains(t, notes, "cpu_seconds: 29 samples are too few")
	require.Contains(t, notes, "b has no measured calls")
	require.Equal(t, []string{
		"services:", `  - name: "sh"`, "    security_policy:", "      resource_limits:",
		"        cpu_cores: 1.25", "        memory_mb: 128", "        timeout_seconds: 3",
	}, r.changes().yaml("sh"))

	// Where nothing reached a limit, the peaks alone say what is needed, also less than there is.
	usage.OomKilledJobs, usage.PeakMemoryMb = 0, figures(100, 30)
	r = checkResources(service, &specqlv1.GetResourceUsageResponse{Usage: []*specqlv1.UsageSummary{usage}}, []*specqlv1.FailurePattern{{ErrorCode: "TIMEOUT", Failures: 3}})
	require.InDelta(t, 48, r.suggested["security_policy.resource_limits.memory_mb"], 0)
	require.InDelta(t, 20, r.suggested["security_policy.resource_limits.timeout_seconds"], 0)

	r = checkResources(service, &specqlv1.GetResourceUsageResponse{}, nil)
	require.Empty(t, r.suggested)
	require.Empty(t, r.checks)
}

func TestSince(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_000_000, 0).UTC()
	for text, want := range map[string]time.Time{
		"90m": now.Add(-90 * time.Minute), "7d": now.Add(-7 * 24 * time.Hour), "0.5d": now.Add(-12 * time.Hour), "2026-01-31T12:00:00Z": time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC),
	} {
		got, err := (&since{text}).time(now)
		require.NoError(t, err)
		require.True(t, want.Equal(got.AsTime()), text)
	}
	got, err := (&since{"all"}).time(now)
	require.NoError(t, err)
	require.Nil(t, got)
	for _, text := range []string{"", "yesterday", "-1h", "7dd", "NaNd", "Infd", "9e99d"} {
		_, err := (&since{text}).time(now)
		require.Error(t, err, text)
	}
}

package command

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/runner"
)

// TestPolicyChanges: what the runners say is read as they write it.
func TestChangesText(t *testing.T) {
	t.Parallel()
	for want, changes := range map[string][]*runnerv1.PolicyChange{
		`add "a.example", "b.example" to allowed_domains`: {runner.AddTo(false, "allowed_domains", "a.example", "b.example")},
		`add "/bin/ls" to allowed_commands; and add "/bin/ls" to allowed_commands, in the runner's --policy file`: {
			runner.AddTo(false, "allowed_commands", "/bin/ls"), runner.AddTo(true, "allowed_commands", "/bin/ls"),
		},
		"add 8080 to allowed_ports":                                 {runner.AddTo(false, "allowed_ports", 8080)},
		"set allow_private_networks: true":                          {runner.SetTo(false, "allow_private_networks", true)},
		"raise resource_limits.memory_mb above 64":                  {runner.RaiseAbove(false, "resource_limits.memory_mb", 64)},
		"no change of a policy allows it: see what the runner says": nil,
	} {
		require.Equal(t, want, changesText(changes))
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
	ls := []*runnerv1.PolicyChange{runner.AddTo(false, "allowed_commands", "/bin/ls")}
	size := func(n int) []*runnerv1.PolicyChange {
		return []*runnerv1.PolicyChange{runner.SetTo(false, "max_request_size", n)}
	}
	list := []*specqlv1.SecurityViolation{
		{Operation: "a", Rule: "allowed_commands", Attempted: "/bin/ls", AllowedBy: ls, OccurredAt: at(9), Subject: "ann", RunId: "r9"},
		{Operation: "b", Rule: "max_request_size", Attempted: "900 bytes", AllowedBy: size(900), OccurredAt: at(8)},
		{Operation: "a", Rule: "allowed_commands", Attempted: "/bin/ls", AllowedBy: ls, OccurredAt: at(7), Subject: "bob", RunId: "r7"},
		{Operation: "b", Rule: "max_request_size", Attempted: "700 bytes", AllowedBy: size(700), OccurredAt: at(6)},
		{Operation: "d", Rule: "resource_limits.memory_mb", AllowedBy: []*runnerv1.PolicyChange{runner.RaiseAbove(false, "resource_limits.memory_mb", 64)}, OccurredAt: at(6)},
		{Operation: "c", Rule: "ceiling.allowed_commands", Attempted: "/bin/rm", AllowedBy: []*runnerv1.PolicyChange{runner.AddTo(true, "allowed_commands", "/bin/rm")}, OccurredAt: at(5)},
	}
	found := audit(list)
	require.Len(t, found, 5)
	require.Equal(t, []any{"a", 2, []string{"ann", "bob"}, "r9", int64(7 * 60), int64(9 * 60)},
		[]any{found[0].operation, found[0].count, found[0].subjects, found[0].lastRun, found[0].first.Unix(), found[0].last.Unix()})
	s := &specqlv1.ServiceInfo{Name: "sh: x", SecurityPolicy: structOf(t, map[string]any{"allowed_commands": []any{"/bin/cat"}})}
	require.Equal(t, strings.Split(`services:
  - name: "sh: x"
    security_policy:
      allowed_commands: ["/bin/cat", "/bin/ls"]
      max_request_size: 900
      resource_limits:
        memory_mb: 128`, "\n"), auditChanges(s, found).yaml(s.GetName()))
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

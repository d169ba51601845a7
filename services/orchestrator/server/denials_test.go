package server_test

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/server"
)

// lockedBuffer takes a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A denial is a row, an event and a count, with the rule's line in the registry that the run began with.
func TestDenials(t *testing.T) {
	t.Parallel()
	log := &lockedBuffer{}
	s := start(t, t.TempDir(), func(o *server.Options) {
		o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(echoRegistry + `
      - {name: deny}
    security_policy:
      allowed_things: [a]
`)}
		o.Logger = slog.New(slog.NewTextHandler(log, nil))
	})
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("deny"), Wait: durationpb.New(time.Minute)})
	require.Equal(t, "POLICY_VIOLATION", run.GetError().GetCode())

	insight := specqlv1.NewInsightServiceClient(s.conn)
	audit, err := insight.GetSecurityAudit(t.Context(), &specqlv1.GetSecurityAuditRequest{Filter: &specqlv1.JobFilter{Service: "svc"}})
	require.NoError(t, err)
	require.Len(t, audit.GetViolations(), 2)
	v := audit.GetViolations()[0]
	require.Equal(t, []string{"allowed_things", "thing b", "POLICY_VIOLATION", "registry.yaml:15:7", "anonymous", run.GetId()},
		[]string{v.GetRule(), v.GetAttempted(), v.GetErrorCode(), v.GetRuleSource(), v.GetSubject(), v.GetRunId()})
	require.NotEmpty(t, v.GetRunner())
	require.Equal(t, []any{"allowed_things", "b", false}, []any{v.GetAllowedBy()[0].GetKey(), v.GetAllowedBy()[0].GetAdd()[0].AsInterface(), v.GetAllowedBy()[0].GetCeiling()})
	ceiling := audit.GetViolations()[1]
	require.Equal(t, "ceiling.allowed_things", ceiling.GetRule())
	require.Empty(t, ceiling.GetRuleSource(), "the operator's policy has no place in the registry")
	require.True(t, ceiling.GetAllowedBy()[0].GetCeiling())

	require.Regexp(t, `level=WARN msg="a policy denied a call" run_id=`+run.GetId()+` job_id=\S+ service=svc operation=deny code=POLICY_VIOLATION rule=allowed_things rule_source=registry.yaml:15:7 attempted="thing b"`, log.String())
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.metrics+"/metrics", nil)
	require.NoError(t, err)
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Contains(t, string(body), `specql_policy_denials_total{code="POLICY_VIOLATION",execution_type="echo",rule="allowed_things",service="svc"} 1`)

	// A runner that cannot check jobs of the past says so.
	_, err = insight.ReplayPolicy(t.Context(), &specqlv1.ReplayPolicyRequest{Filter: &specqlv1.JobFilter{Service: "svc"}})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "%v", err)
	for _, bad := range []*specqlv1.ReplayPolicyRequest{{}, {Filter: &specqlv1.JobFilter{Service: "svc"}, PageSize: -1}, {Filter: &specqlv1.JobFilter{Service: "svc"}, PageSize: 1001}} {
		_, err = insight.ReplayPolicy(t.Context(), bad)
		require.Equal(t, codes.InvalidArgument, status.Code(err))
	}
	_, err = insight.ReplayPolicy(t.Context(), &specqlv1.ReplayPolicyRequest{Filter: &specqlv1.JobFilter{Service: "nope"}})
	require.Equal(t, codes.NotFound, status.Code(err))
	_, err = insight.ReplayPolicy(t.Context(), &specqlv1.ReplayPolicyRequest{Filter: &specqlv1.JobFilter{Service: "svc"}, SecurityPolicy: object(t, `{"allowed_thing": []}`)})
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
}

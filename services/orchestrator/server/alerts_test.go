package server_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
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

// An alert of the registry and one of a file of its own fire, tell a service that fails, and show
// it; what the notification's own failure is, no alert counts.
func TestAlerts(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	s := start(t, data, func(o *server.Options) {
		o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(echoRegistry + `
alerts:
  - {name: "Echo Failures", condition: "echo_failures > 1", execution_type: echo, window: 1m, notify: {service: svc, operation: say}}
  - {name: Quiet, condition: "echo_error_rate > 0.5", execution_type: echo}
`)}
		o.Alerts = &spec.File{Name: "alerts.yaml", Content: []byte(`
alerts:
  - {name: Own, condition: "echo_failures > 1", window: 1m, notify: {service: svc, operation: refuse, input: {text: "$alert.name"}}}
`)}
	})
	insight := specqlv1.NewInsightServiceClient(s.conn)
	list := func() []*specqlv1.Alert {
		t.Helper()
		res, err := insight.ListAlerts(t.Context(), &specqlv1.ListAlertsRequest{History: 10})
		require.NoError(t, err)
		return res.GetAlerts()
	}
	alerts := list()
	require.Len(t, alerts, 3)
	require.Equal(t, []string{"Echo Failures", "Quiet", "Own"}, []string{alerts[0].GetName(), alerts[1].GetName(), alerts[2].GetName()})
	require.InDelta(t, 1, alerts[0].GetThreshold(), 0)
	require.Equal(t, time.Hour, alerts[1].GetWindow().AsDuration())
	require.Contains(t, alerts[2].GetSource(), "alerts.yaml:3")
	require.Contains(t, alerts[1].GetPrometheus(), "specql_jobs_total")

	for range 2 {
		s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("refuse"), Wait: durationpb.New(time.Minute)})
		<-s.runner.arrived
	}
	told := map[string]map[string]any{}
	for len(told) < 2 {
		select {
		case job := <-s.runner.arrived:
			var input map[string]any
			require.NoError(t, json.Unmarshal(job.Input, &input))
			told[job.Operation.Name] = input
			require.Equal(t, "system:alerts", job.Subject)
		case <-time.After(time.Minute):
			t.Fatal("nobody was told")
		}
	}
	require.Equal(t, map[string]any{"text": "Own"}, told["refuse"])
	require.Equal(t, []any{"Echo Failures", "firing", 2.0, 1.0, 60.0}, []any{
		told["say"]["alert"], told["say"]["state"], told["say"]["value"], told["say"]["threshold"], told["say"]["window_seconds"],
	})
	require.Eventually(t, func() bool {
		alerts = list()
		return alerts[0].GetHistory()[0].GetNotifyRunId() != "" && alerts[2].GetHistory()[0].GetNotifyRunId() != ""
	}, time.Minute, 10*time.Millisecond)
	require.Equal(t, []string{"firing", "inactive", "firing"}, []string{alerts[0].GetState(), alerts[1].GetState(), alerts[2].GetState()})
	require.Contains(t, alerts[1].GetDetail(), "2 jobs ended within the window")
	final := watch(t, s, alerts[2].GetHistory()[0].GetNotifyRunId(), 0, nil)
	require.Equal(t, specqlv1.Status_STATUS_FAILED, final.GetStatus())
	evaluated := alerts[2].GetEvaluatedAt().AsTime()
	require.Eventually(t, func() bool { return list()[2].GetEvaluatedAt().AsTime().After(evaluated.Add(time.Second)) }, time.Minute, 50*time.Millisecond)
	require.InDelta(t, 2, list()[2].GetValues()["echo_failures"], 0, "its own notification is no failure")

	get := func(url string) string {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		require.NoError(t, err)
		res, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer func() { _ = res.Body.Close() }()
		body, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		return string(body)
	}
	require.Contains(t, get("http://"+s.web+"/alerts"), "<td>Echo Failures</td><td class=\"firing\">firing</td>")
	metrics := get("http://" + s.metrics + "/metrics")
	require.Contains(t, metrics, `specql_alert_changes_total{to="firing"} 2`)
	for _, a := range alerts {
		for name := range strings.FieldsFuncSeq(a.GetPrometheus(), func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') }) {
			if strings.HasPrefix(name, "specql_") {
				require.Contains(t, metrics, "# TYPE "+name+" ", "the rules name what is exported")
			}
		}
	}

	_, err := insight.ListAlerts(t.Context(), &specqlv1.ListAlertsRequest{Name: "nope"})
	require.Equal(t, codes.NotFound, status.Code(err))
	_, err = insight.ListAlerts(t.Context(), &specqlv1.ListAlertsRequest{History: 101})
	require.Equal(t, codes.InvalidArgument, status.Code(err))

	// What stood before stands after a restart, and is not told once more.
	before := s.runner.count()
	s.stop()
	s = start(t, data, func(o *server.Options) {
		o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(echoRegistry + `
alerts: [{name: "Echo Failures", condition: "echo_failures > 1", execution_type: echo, window: 1m, notify: {service: svc, operation: say}}]
`)}
	})
	insight = specqlv1.NewInsightServiceClient(s.conn)
	since := alerts[0].GetSince().AsTime()
	alerts = list()
	require.Equal(t, []any{"firing", since}, []any{alerts[0].GetState(), alerts[0].GetSince().AsTime()})
	require.Positive(t, before)
}

func TestAlertsThatCannotBe(t *testing.T) {
	t.Parallel()
	problems := func(alerts string) string {
		t.Helper()
		found, err := server.ValidateFiles(t.Context(), server.ValidateInput{Registry: spec.File{Name: "registry.yaml", Content: []byte(alerts)}})
		require.NoError(t, err)
		var all []string
		for _, p := range found {
			all = append(all, p.String())
		}
		return strings.Join(all, "\n")
	}
	require.Contains(t, problems(`alerts: [{name: a, condition: "http_failures > 1", notify: {service: nobody, operation: x}}]`), `there is no service "nobody"`)
	require.Contains(t, problems(`alerts: [{name: a, condition: "http_failures.x > 1"}]`), "is a number and has no fields")
	require.Empty(t, problems(`alerts: [{name: a, condition: "http_p99_seconds > 1"}]`))
}

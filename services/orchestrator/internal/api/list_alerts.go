package api

import (
	"context"
	"encoding/json"

	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/alert"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// ListAlerts implements InsightService.
func (i *Insight) ListAlerts(ctx context.Context, req *specqlv1.ListAlertsRequest) (*specqlv1.ListAlertsResponse, error) {
	var v intake.Violations
	name(&v, "name", req.GetName())
	if h := req.GetHistory(); h < 0 || h > store.MaxAlertEvents {
		v.Add("history", "has to be between 0 and %d", store.MaxAlertEvents)
	}
	if err := v.Err(); err != nil {
		return nil, err
	}
	if err := auth.From(ctx).MaySeeAll(); err != nil {
		return nil, err
	}
	rows, err := i.Alerts.AlertStates(ctx)
	if err != nil {
		return nil, reportError(err)
	}
	states := map[string]*store.AlertState{}
	for _, s := range rows {
		states[s.Name] = s
	}
	resp := &specqlv1.ListAlertsResponse{}
	if resp.Evaluator, err = i.Alerts.AlertLeader(ctx); err != nil {
		return nil, reportError(err)
	}
	for _, a := range i.Registry.Current().Registry.Alerts {
		if req.GetName() != "" && a.Name != req.GetName() {
			continue
		}
		out := alertProto(a, states[a.Name])
		if req.GetHistory() > 0 {
			events, err := i.Alerts.AlertEvents(ctx, a.Name, int(req.GetHistory()))
			if err != nil {
				return nil, reportError(err)
			}
			for _, e := range events {
				out.History = append(out.History, &specqlv1.AlertChange{
					From: e.From, To: e.To, At: timeProto(e.OccurredAt), Values: alertValues(e.Figures), NotifyRunId: e.NotifyRunID, NotifyError: e.NotifyError,
				})
			}
		}
		resp.Alerts = append(resp.Alerts, out)
	}
	if req.GetName() != "" && len(resp.GetAlerts()) == 0 {
		return nil, notFound("alert", req.GetName(), "`specql alerts` shows those there are")
	}
	return resp, nil
}

func alertProto(a *spec.Alert, s *store.AlertState) *specqlv1.Alert {
	out := &specqlv1.Alert{
		Name: a.Name, Condition: a.Condition.Source(), ExecutionType: a.ExecutionType, Window: durationpb.New(a.Window), State: alert.Inactive,
		Source: a.Position.String(), Prometheus: alert.PromQL(a),
		PendingFor: durationpb.New(alert.PendingFor(a.Window)), FiringFor: durationpb.New(alert.FiringFor(a.Window)),
	}
	if t, ok := alert.Threshold(a.Condition); ok {
		out.Threshold = &t
	}
	if n := a.Notify; n != nil {
		out.NotifyService, out.NotifyOperation = n.Service, n.Operation
	}
	if s != nil {
		out.State, out.Since, out.EvaluatedAt, out.Detail = s.State, timeProto(s.Since), timeProto(s.EvaluatedAt), s.Detail
		out.Values = alertValues(s.Figures)
	}
	return out
}

// alertValues reads stored figures; nil where they are not what was stored.
func alertValues(raw json.RawMessage) map[string]float64 {
	var out map[string]float64
	if json.Unmarshal(raw, &out) != nil {
		return nil
	}
	return out
}

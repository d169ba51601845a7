package engine

import (
	"context"
	"log/slog"
	"strings"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// ceilingPrefix begins the rules of the operator's policy where a runner tells the two apart.
const ceilingPrefix = "ceiling."

// maxDenials bounds what is told of one attempt.
const maxDenials = 20

// denied tells what a policy or a limit of one ended an attempt, and writes into its checks where
// the rules stand in the registry that the run began with. Nothing where neither did.
func (r *run) denied(ctx context.Context, n *plan.Call, job *store.Job, out *Outcome) {
	if out.Err == nil {
		return
	}
	switch out.Err.Code {
	case fault.PolicyViolation, fault.BudgetExceeded, fault.RateLimited, fault.ResourceExceeded:
	default:
		return
	}
	told := 0
	for _, check := range out.Security.GetChecks() {
		if check.GetAllowed() {
			continue
		}
		if rule, ceiling := ruleOf(check); !ceiling {
			check.RuleSource = n.Service.PositionOf("security_policy." + rule).String()
		}
		if told++; told <= maxDenials {
			r.tellDenial(ctx, job, out.Err.Code, check, out.Security.GetRunner())
		}
	}
	if told > 0 {
		return
	}
	switch out.Err.Code {
	case fault.PolicyViolation, fault.BudgetExceeded:
		r.tellDenial(ctx, job, out.Err.Code, &runnerv1.PolicyCheck{Detail: out.Err.Message}, out.Security.GetRunner())
	default: // a target's own limit, or one that no policy sets
	}
}

// limitDenied tells which limit refused an attempt for good, as a check of a runner would: no runner was asked.
func (r *run) limitDenied(ctx context.Context, n *plan.Call, job *store.Job, l *Limit, refused *fault.Error) {
	key, bound := l.AttemptsKey, float64(l.MaxAttempts)
	if l.MaxCost > 0 && (l.MaxAttempts == 0 || l.CostKey != "" && strings.Contains(refused.Message, " USD")) {
		key, bound = l.CostKey, l.MaxCost
	}
	check := &runnerv1.PolicyCheck{Rule: key, Subject: "call of " + job.Service, Detail: refused.Message}
	if key == "" {
		check.Rule = l.Rule
	} else {
		check.AllowedBy = []*runnerv1.PolicyChange{{Key: key, Above: &bound, Ceiling: l.Ceiling}}
	}
	out := &Outcome{Err: refused, Security: &runnerv1.SecurityContext{
		Checks: []*runnerv1.PolicyCheck{check}, Subject: job.TriggeredBy, TenantId: job.TenantID,
	}}
	r.denied(ctx, n, job, out)
	keepSecurity(job, out.Security)
}

// ruleOf is the key of the policy that denied, and whether it is the operator's alone.
func ruleOf(check *runnerv1.PolicyCheck) (rule string, ceiling bool) {
	rule, ceiling = strings.CutPrefix(check.GetRule(), ceilingPrefix)
	if changes := check.GetAllowedBy(); len(changes) > 0 {
		ceiling = true
		for _, c := range changes {
			ceiling = ceiling && c.GetCeiling()
		}
	}
	return rule, ceiling
}

func (r *run) tellDenial(ctx context.Context, job *store.Job, code fault.Code, check *runnerv1.PolicyCheck, runner string) {
	r.e.Observer.Denied(job.ExecutionType, job.Service, check.GetRule(), code)
	r.e.Logger.LogAttrs(ctx, slog.LevelWarn, "a policy denied a call",
		slog.String("run_id", r.id), slog.String("job_id", job.ID), slog.String("service", job.Service), slog.String("operation", job.Operation),
		slog.String("code", string(code)), slog.String("rule", check.GetRule()), slog.String("rule_source", check.GetRuleSource()),
		slog.String("attempted", clip(check.GetSubject(), maxTold)), slog.String("detail", clip(check.GetDetail(), maxTold)),
		slog.String("subject", job.TriggeredBy), slog.String("tenant_id", job.TenantID), slog.String("runner", runner))
}

// maxTold bounds a text in the log, in bytes.
const maxTold = 500

package mesh

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/telemetry"
)

// Rule is what a caller was refused by.
type Rule string

// The rules. A label of a metric has them, so that they are few.
const (
	// RuleHandshake is TLS: a certificate that is missing, too old, or of another CA.
	RuleHandshake Rule = "handshake"
	// RuleCertificate is the role in a certificate.
	RuleCertificate Rule = "certificate"
	// RuleToken is a token that is missing or not valid, RuleTokens too many of those from one address.
	RuleToken  Rule = "token"
	RuleTokens Rule = "too_many_tokens"
	// RuleRole is a role that is too low, RuleTenant a tenant that is not the caller's.
	RuleRole   Rule = "role"
	RuleTenant Rule = "tenant"
	// RuleOther is any other refusal.
	RuleOther Rule = "other"
)

// Denial is an error that refuses a caller. What it says beside its text is for the log alone.
type Denial struct {
	Code    codes.Code
	Message string
	Rule    Rule
	// Subject and Role are the caller's, where it is known who calls. Need is the role that was needed.
	Subject, Role, Need string
	// Tenant is the one that was asked for.
	Tenant string
}

// Error implements error.
func (d *Denial) Error() string { return d.GRPCStatus().Err().Error() }

// GRPCStatus is what the caller is told.
func (d *Denial) GRPCStatus() *status.Status { return status.New(d.Code, d.Message) }

// Denials write down who was refused: a line of the log, and a count.
type Denials struct {
	log     *slog.Logger
	refused *prometheus.CounterVec

	mu sync.Mutex
	// told are the lines of each rule, so that a flood of one hides no other.
	told map[Rule]*window
}

type window struct {
	since time.Time
	n     int
}

// Refused callers are logged this often in a while for each rule, so that nobody fills a disk by calling.
const (
	denialWindow = 10 * time.Second
	maxDenials   = 50
)

// NewDenials makes the log and the count of a surface. Several of one registerer count together.
func NewDenials(log *slog.Logger, r prometheus.Registerer) *Denials {
	return &Denials{
		log: telemetry.OrDiscard(log), told: map[Rule]*window{},
		refused: telemetry.Registered(r, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_callers_refused_total", Help: "Callers that were refused, by what they called and by the rule that refused them.",
		}, []string{"method", "rule"})),
	}
}

// Tell writes down that err refused a caller: what it called, from where, and with a certificate of which role. Errors other
// than refusals are nothing to it: it gives false. method is one of few, as a metric has it.
func (d *Denials) Tell(ctx context.Context, method, remote, certificate string, err error) bool {
	code := status.Code(err)
	denial, ok := errors.AsType[*Denial](err)
	if !ok && code != codes.PermissionDenied && code != codes.Unauthenticated {
		return false
	}
	if !ok {
		denial = &Denial{Code: code, Message: cause(err), Rule: RuleOther}
	}
	d.refused.WithLabelValues(method, string(denial.Rule)).Inc()
	omitted, tell := d.tell(denial.Rule, time.Now())
	if omitted > 0 {
		d.log.LogAttrs(ctx, slog.LevelWarn, "more callers were refused than are logged", slog.String("rule", string(denial.Rule)), slog.Int("omitted", omitted))
	}
	if !tell {
		return true
	}
	attrs := []slog.Attr{slog.String("rule", string(denial.Rule)), slog.String("method", method), slog.String("remote", remote), slog.String("code", denial.Code.String())}
	for _, a := range []slog.Attr{
		slog.String("subject", denial.Subject), slog.String("role", denial.Role), slog.String("need", denial.Need),
		slog.String("tenant", denial.Tenant), slog.String("caller", certificate),
	} {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	d.log.LogAttrs(ctx, slog.LevelWarn, "a caller was refused", append(attrs, slog.String("error", denial.Message))...)
	return true
}

// tell says whether a refusal is to be logged, and how many were not in the window before.
func (d *Denials) tell(rule Rule, now time.Time) (omitted int, tell bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := d.told[rule]
	if w == nil {
		w = &window{}
		d.told[rule] = w
	}
	if now.Sub(w.since) >= denialWindow {
		omitted = max(0, w.n-maxDenials)
		w.since, w.n = now, 0
	}
	w.n++
	return omitted, w.n <= maxDenials
}

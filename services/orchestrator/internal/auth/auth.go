// Package auth tells who calls the API and the console, and what they may do: tokens of a
// file, or of an OIDC issuer; roles; tenants.
package auth

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/telemetry"
)

// Role is what a caller may do. A higher one may do all that a lower one may.
type Role int

// The roles, from the lowest.
const (
	NoRole Role = iota
	Viewer
	Operator
	Admin
)

var roleNames = [...]string{NoRole: "none", Viewer: "viewer", Operator: "operator", Admin: "admin"}

// String implements fmt.Stringer.
func (r Role) String() string {
	if r < 0 || int(r) >= len(roleNames) {
		return "none"
	}
	return roleNames[r]
}

// ParseRole reads viewer, operator or admin.
func ParseRole(text string) (Role, error) {
	if i := slices.Index(roleNames[:], text); i > int(NoRole) {
		return Role(i), nil
	}
	return NoRole, fmt.Errorf("%.40q is no role: write viewer, operator or admin", text)
}

// AllTenants is what a token names in place of its tenants to work for all of them.
const AllTenants = "*"

var tenantName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$`)

// CheckTenant refuses what is no name of a tenant.
func CheckTenant(name string) error {
	if !tenantName.MatchString(name) {
		return fmt.Errorf("%.130q is no tenant: use up to 128 letters, digits and . _ : @ -, with a letter or digit first", name)
	}
	return nil
}

// Caller is who calls. The zero value may do nothing and sees nothing.
type Caller struct {
	// Subject is written down with what the caller does.
	Subject string
	Role    Role
	// all says that the caller is of every tenant; tenants are else the only ones, "" being
	// what belongs to none.
	all     bool
	tenants []string
	// acting is the tenant that the caller chose for this call; "" for none.
	acting string
	// expires is when the token does; zero for never.
	expires time.Time
}

// Anonymous is everybody, where neither tokens nor an issuer are configured. A tenant may be
// chosen, or "".
func Anonymous(subject, tenant string) *Caller {
	return &Caller{Subject: subject, Role: Admin, all: true, acting: tenant}
}

// Tenants are those whose records the caller sees: nil for all.
func (c *Caller) Tenants() []string {
	switch {
	case c.acting != "":
		return []string{c.acting}
	case c.all:
		return nil
	}
	return append([]string{}, c.tenants...)
}

// Sees tells whether the caller sees what belongs to a tenant.
func (c *Caller) Sees(tenant string) bool {
	if c.acting != "" {
		return tenant == c.acting
	}
	return c.all || slices.Contains(c.tenants, tenant)
}

// covers tells whether the caller sees all that another does.
func (c *Caller) covers(other *Caller) bool {
	if c.acting != "" || other.acting != "" {
		return c.acting == other.acting
	}
	return c.all || !other.all && !slices.ContainsFunc(other.tenants, func(t string) bool { return !slices.Contains(c.tenants, t) })
}

// MayAll refuses what changes something of all tenants to who is not of all, whatever tenant the call is for.
func (c *Caller) MayAll() error {
	if c.all {
		return nil
	}
	return c.ofAll()
}

// Tenant is the one that what the caller starts belongs to. One who has several must choose.
func (c *Caller) Tenant() (string, error) {
	switch {
	case c.acting != "":
		return c.acting, nil
	case c.all:
		return "", nil
	case len(c.tenants) == 1:
		return c.tenants[0], nil
	case len(c.tenants) == 0:
		return "", status.Errorf(codes.PermissionDenied, "%s belongs to no tenant", c.Subject)
	}
	return "", status.Error(codes.InvalidArgument, "the token is of several tenants: choose one (--tenant, SPECQL_TENANT or the metadata "+TenantKey+")")
}

// TenantKey is the metadata key that chooses a tenant.
const TenantKey = "specql-tenant"

// ActingFor is the caller acting for a tenant that is asked for; "" for none.
func (c *Caller) ActingFor(tenant string) (*Caller, error) {
	if tenant == "" {
		return c, nil
	}
	if err := CheckTenant(tenant); err != nil {
		return nil, status.Error(codes.InvalidArgument, TenantKey+": "+err.Error())
	}
	if !c.all && !slices.Contains(c.tenants, tenant) {
		d := c.denial(mesh.RuleTenant, fmt.Sprintf("%s does not belong to the tenant %s", c.Subject, tenant))
		d.Tenant = tenant
		return nil, d
	}
	acting := *c
	acting.acting = tenant
	return &acting, nil
}

// May refuses what needs a higher role.
func (c *Caller) May(need Role) error {
	if need != NoRole && c.Role >= need {
		return nil
	}
	d := c.denial(mesh.RuleRole, fmt.Sprintf("this needs the role %s; %s has the role %s", need, c.Subject, c.Role))
	d.Need = need.String()
	return d
}

// MaySeeAll refuses what sums up all tenants to who is not of all.
func (c *Caller) MaySeeAll() error {
	if c.Tenants() == nil {
		return nil
	}
	return c.ofAll()
}

func (c *Caller) ofAll() error {
	d := c.denial(mesh.RuleTenant, "this is of all tenants, and the caller is not")
	d.Tenant = AllTenants
	return d
}

func (c *Caller) denial(rule mesh.Rule, message string) *mesh.Denial {
	return &mesh.Denial{Code: codes.PermissionDenied, Message: message, Rule: rule, Subject: c.Subject, Role: c.Role.String()}
}

type callerKey struct{}

// With is a context of calls of a caller.
func With(ctx context.Context, c *Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// From is the caller of a context; one who sees nothing where there is none.
func From(ctx context.Context) *Caller {
	if c, ok := ctx.Value(callerKey{}).(*Caller); ok {
		return c
	}
	return &Caller{}
}

// Options say where identities come from. Without any, everybody may do everything.
type Options struct {
	// Tokens is the path of a file of tokens; none if empty.
	Tokens string
	// OIDC is an issuer of tokens; nil for none.
	OIDC *OIDC
	// Logger is told of files that cannot be used, and of issuers that do not answer.
	Logger *slog.Logger
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// Authenticator tells who calls.
type Authenticator struct {
	tokens *tokens // nil: none
	issuer *issuer // nil: none
	now    func() time.Time
	failed failures
}

// New reads the file of tokens, where one is named, and fails where it cannot be used. An
// issuer is asked when the first token comes.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{now: o.Now}
	if a.now == nil {
		a.now = time.Now
	}
	log := telemetry.OrDiscard(o.Logger)
	if o.Tokens != "" {
		t, err := loadTokens(o.Tokens, log)
		if err != nil {
			return nil, err
		}
		a.tokens = t
	}
	if o.OIDC != nil {
		i, err := newIssuer(*o.OIDC, log, a.now)
		if err != nil {
			return nil, err
		}
		a.issuer = i
	}
	return a, nil
}

// Enabled tells whether callers have to say who they are.
func (a *Authenticator) Enabled() bool { return a.tokens != nil || a.issuer != nil }

// maxToken bounds a token in bytes: tokens of an issuer may hold many claims.
const maxToken = 16 << 10

// errToken is all that is said of a token that is not taken: which part of it is wrong helps
// nobody but who guesses.
var errToken error = &mesh.Denial{Code: codes.Unauthenticated, Rule: mesh.RuleToken, Message: "a valid token is needed (--token, SPECQL_TOKEN or the metadata authorization: Bearer TOKEN)"}

// errTooMany turns away an address whose tokens were wrong again and again.
var errTooMany error = &mesh.Denial{Code: codes.Unauthenticated, Rule: mesh.RuleTokens, Message: "too many tokens from this address were not valid; wait a few seconds"}

// Authenticate tells whose a token is. remote is where it came from. Errors are gRPC statuses.
func (a *Authenticator) Authenticate(ctx context.Context, token, remote string) (*Caller, error) {
	if token == "" || len(token) > maxToken {
		return nil, errToken
	}
	sum := sha256.Sum256([]byte(token))
	now := a.now()
	if a.tokens != nil {
		if c := a.tokens.find(sum, now); c != nil {
			return c, nil
		}
	}
	if a.issuer != nil {
		if c := a.issuer.cached(sum, now); c != nil {
			return c, nil
		}
	}
	if !a.failed.allow(remote, now) {
		return nil, errTooMany
	}
	if a.issuer != nil && strings.Count(token, ".") == 2 {
		c, err := a.issuer.verify(ctx, token, sum, now)
		if err == nil {
			return c, nil
		}
		if status.Code(err) == codes.Unavailable {
			return nil, err
		}
	}
	a.failed.add(remote, now)
	return nil, errToken
}

// Failures of one address in failureWindow, after which its unknown tokens are not looked at.
const (
	failureWindow = 10 * time.Second
	maxFailures   = 50
	maxAddresses  = 10_000
)

// failures counts wrong tokens by address.
type failures struct {
	mu    sync.Mutex
	since time.Time
	count map[string]int
}

func (f *failures) allow(remote string, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return now.Sub(f.since) >= failureWindow || f.count[remote] < maxFailures
}

func (f *failures) add(remote string, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count == nil || now.Sub(f.since) >= failureWindow || len(f.count) >= maxAddresses {
		f.since, f.count = now, map[string]int{}
	}
	f.count[remote]++
}

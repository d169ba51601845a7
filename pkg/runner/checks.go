package runner

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/types/known/structpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
)

// maxChecks bounds the checks kept of one job; as many denials again are kept beyond it.
const maxChecks = 1000

// Checks collects the policy checks of one job. The zero value is ready; all methods are
// safe for concurrent use.
type Checks struct {
	mu   sync.Mutex
	list []*runnerv1.PolicyCheck
	// few is room for the first ones: most jobs have no more.
	few struct {
		checks [4]runnerv1.PolicyCheck
		list   [4]*runnerv1.PolicyCheck
	}
}

// Allow notes that the policy's rule allows the subject: a resolved path, a host, an
// address, an image.
func (c *Checks) Allow(rule, subject string) {
	c.add(rule, subject, true, "", nil)
}

// Deny notes that the rule forbids the subject and returns the POLICY_VIOLATION. detail
// says why, and the smallest change that would allow it; allowedBy are the same changes for
// programs, all of which it takes: none where no policy could allow it.
func (c *Checks) Deny(rule, subject, detail string, allowedBy ...*runnerv1.PolicyChange) *fault.Error {
	c.add(rule, subject, false, detail, allowedBy)
	return fault.New(fault.PolicyViolation, "%s forbids %s: %s", rule, subject, detail)
}

// DenyOnce is Deny for a limit that is found passed more than once: what was noted first stays.
func (c *Checks) DenyOnce(rule, subject, detail string, allowedBy ...*runnerv1.PolicyChange) {
	c.mu.Lock()
	noted := slices.ContainsFunc(c.list, func(check *runnerv1.PolicyCheck) bool { return check.GetRule() == rule && !check.GetAllowed() })
	c.mu.Unlock()
	if !noted {
		_ = c.Deny(rule, subject, detail, allowedBy...)
	}
}

// maxChanges bounds the entries of a change.
const maxChanges = 100

// AddTo is the change that adds entries, texts or numbers, to the list at a key of a policy, such as
// allowed_commands. ceiling says that it is the operator's policy.
func AddTo(ceiling bool, key string, entries ...any) *runnerv1.PolicyChange {
	change := &runnerv1.PolicyChange{Key: key, Ceiling: ceiling}
	for _, e := range entries[:min(len(entries), maxChanges)] {
		change.Add = append(change.Add, value(e))
	}
	return change
}

// SetTo is the change that gives a key of a policy a value: a text, a number or a boolean.
func SetTo(ceiling bool, key string, to any) *runnerv1.PolicyChange {
	return &runnerv1.PolicyChange{Key: key, Ceiling: ceiling, Set: value(to)}
}

// RaiseAbove is the change that raises a limit by as much as nobody can tell: above what it is now.
func RaiseAbove(ceiling bool, key string, limit float64) *runnerv1.PolicyChange {
	return &runnerv1.PolicyChange{Key: key, Ceiling: ceiling, Above: &limit}
}

func value(v any) *structpb.Value {
	out, err := structpb.NewValue(v)
	if err != nil { // not UTF-8, which JSON has no form for
		return structpb.NewStringValue(strings.ToValidUTF8(fmt.Sprint(v), "\uFFFD"))
	}
	return out
}

func (c *Checks) add(rule, subject string, allowed bool, detail string, allowedBy []*runnerv1.PolicyChange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.list)
	if n >= 2*maxChecks || allowed && n >= maxChecks {
		return
	}
	var check *runnerv1.PolicyCheck
	if n < len(c.few.checks) {
		check = &c.few.checks[n]
	} else {
		check = &runnerv1.PolicyCheck{}
	}
	if n == 0 {
		c.list = c.few.list[:0]
	}
	check.Rule, check.Subject, check.Allowed, check.Detail, check.AllowedBy = rule, subject, allowed, detail, allowedBy
	c.list = append(c.list, check)
}

// Context gives what was checked so far, for [Result]. policyDigest is the [Digest] of the
// effective policy; isolation names the features in force.
func (c *Checks) Context(policyDigest string, isolation ...string) *runnerv1.SecurityContext {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &runnerv1.SecurityContext{
		PolicyDigest: policyDigest,
		Checks:       slices.Clone(c.list),
		Isolation:    slices.Clone(isolation),
	}
}

// ownVariables hold what the mesh itself gets in with. They are not for services.
var ownVariables = []string{"SPECQL_TOKEN", "SPECQL_DATABASE", "DATABASE_URL"}

// OwnVariable says whether an environment variable holds a secret of the mesh itself, which
// no service may name: its token, and the address of its database.
func OwnVariable(envVar string) bool {
	return slices.ContainsFunc(ownVariables, func(own string) bool { return strings.EqualFold(own, envVar) })
}

// EnvVarAllowed says whether allowed_env_vars of a policy lets a service name a variable.
// Entries are exact names, or PREFIX_* for all that begin so. A nil list allows all.
func EnvVarAllowed(allowed []string, envVar string) bool {
	return allowed == nil || slices.ContainsFunc(allowed, func(entry string) bool {
		if prefix, ok := strings.CutSuffix(entry, "*"); ok {
			return strings.HasPrefix(envVar, prefix)
		}
		return entry == envVar
	})
}

// ResolveSecret reads the secret that a *_env_var key names from the runner's environment
// and tells sink to mask it. The error names the variable and never holds the value. A
// variable with a secret of the mesh itself is a POLICY_VIOLATION; hold the name to the
// policies with [EnvVarAllowed] before.
func ResolveSecret(sink Sink, envVar string) (string, error) {
	if envVar == "" {
		return "", fault.New(fault.Validation, "no environment variable is named for the secret")
	}
	if OwnVariable(envVar) {
		return "", fault.New(fault.PolicyViolation, "the environment variable %s belongs to the mesh itself and is given to no service; keep the service's secret in a variable of its own", envVar)
	}
	value, set := os.LookupEnv(envVar)
	switch {
	case !set:
		return "", fault.New(fault.Validation, "the environment variable %s is not set; set it where the runner starts", envVar)
	case value == "":
		return "", fault.New(fault.Validation, "the environment variable %s is empty; set it where the runner starts", envVar)
	}
	if sink != nil {
		sink.Secret(value)
	}
	return value, nil
}

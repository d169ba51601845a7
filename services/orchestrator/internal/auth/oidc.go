package auth

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
)

// OIDC is an issuer of tokens, and what its claims mean.
type OIDC struct {
	// Issuer is its URL, https but on loopback.
	Issuer string
	// Audience is what tokens have to be for.
	Audience string
	// RolesClaim and TenantClaim are names of claims, with dots for claims within claims;
	// roles and tenant if empty. A claim is a text or a list of texts.
	RolesClaim, TenantClaim string
	// Roles and Tenants say what values of the claims mean: a role, and a tenant or "*".
	// Values that are not in them mean nothing; without any a value means itself.
	Roles, Tenants map[string]string
}

const (
	// skew is how far clocks may be apart.
	skew = time.Minute
	// cacheFor is how long a verified token is not verified again.
	cacheFor = time.Minute
	// maxCached bounds the verified tokens.
	maxCached = 10_000
	// An issuer's keys are fetched again after keysFresh, and are used for keysUsable where it
	// does not answer. It is asked no more often than once in askAfter.
	keysFresh  = 10 * time.Minute
	keysUsable = 24 * time.Hour
	askAfter   = 5 * time.Second
	// maxIssuerAnswer bounds what an issuer says, in bytes.
	maxIssuerAnswer = 1 << 20
	maxKeys         = 100
)

// algorithms are those with a public key: a token that a secret signs could be made by
// whoever checks it.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA}

type issuer struct {
	OIDC
	roles   map[string]Role
	keys    *keySet
	checker *oidc.IDTokenVerifier

	mu    sync.Mutex
	known map[[sha256.Size]byte]verified
}

type verified struct {
	caller *Caller
	until  time.Time
}

func newIssuer(o OIDC, log *slog.Logger, now func() time.Time) (*issuer, error) {
	u, err := url.Parse(o.Issuer)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("the issuer %.255q is no URL such as https://login.example.com/realms/mesh", o.Issuer)
	}
	if u.Scheme == "http" && mesh.CheckInsecure(u.Host) != nil {
		return nil, fmt.Errorf("the issuer %.255q has to be https: whoever stands between could issue tokens", o.Issuer)
	}
	if o.Audience == "" {
		return nil, errors.New("an issuer needs an audience: tokens of the issuer that are for other services must not be taken")
	}
	if o.RolesClaim == "" {
		o.RolesClaim = "roles"
	}
	if o.TenantClaim == "" {
		o.TenantClaim = "tenant"
	}
	i := &issuer{OIDC: o, known: map[[sha256.Size]byte]verified{}, roles: map[string]Role{}}
	for value, name := range o.Roles {
		if i.roles[value], err = ParseRole(name); err != nil {
			return nil, fmt.Errorf("the role of %.40q: %w", value, err)
		}
	}
	if len(o.Roles) == 0 {
		for _, r := range []Role{Viewer, Operator, Admin} {
			i.roles[r.String()] = r
		}
	}
	for value, name := range o.Tenants {
		if err := CheckTenant(name); name != AllTenants && err != nil {
			return nil, fmt.Errorf("the tenant of %.40q: %w", value, err)
		}
	}
	i.keys = &keySet{issuer: o.Issuer, log: log, client: &http.Client{
		Timeout: 10 * time.Second,
		// An issuer that moved says so in its documents.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     bounded{http.DefaultTransport},
	}}
	names := make([]string, 0, len(algorithms))
	for _, a := range algorithms {
		names = append(names, string(a))
	}
	i.checker = oidc.NewVerifier(o.Issuer, i.keys, &oidc.Config{
		ClientID: o.Audience, SupportedSigningAlgs: names, Now: func() time.Time { return now().Add(-skew) },
	})
	return i, nil
}

// bounded bounds the answers of an issuer.
type bounded struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxIssuerAnswer), resp.Body}
	}
	return resp, err
}

// cached is the caller of a token that was verified not long ago; nil for none.
func (i *issuer) cached(sum [sha256.Size]byte, now time.Time) *Caller {
	i.mu.Lock()
	defer i.mu.Unlock()
	v, ok := i.known[sum]
	if !ok || !now.Before(v.until) {
		return nil
	}
	return v.caller
}

// verify checks a token, and tells whose it is. The error is UNAVAILABLE where the issuer's
// keys cannot be had.
func (i *issuer) verify(ctx context.Context, token string, sum [sha256.Size]byte, now time.Time) (*Caller, error) {
	t, err := i.checker.Verify(ctx, token)
	if err != nil {
		if errors.Is(err, errNoKeys) || i.keys.empty() {
			return nil, status.Error(codes.Unavailable, "the issuer of tokens does not answer; ask again in a moment")
		}
		return nil, err
	}
	var claims map[string]any
	if err := t.Claims(&claims); err != nil {
		return nil, err
	}
	// As numbers: a time that a claim has no room for is still later than now.
	if before, ok := claims["nbf"].(float64); ok && before > float64(now.Add(skew).Unix()) {
		return nil, errors.New("not valid yet")
	}
	if !isSubject(t.Subject) {
		return nil, errors.New("no subject, or none that can be written down in one line")
	}
	c := &Caller{Subject: t.Subject, expires: t.Expiry}
	for _, value := range texts(claims, i.RolesClaim) {
		c.Role = max(c.Role, i.roles[value])
	}
	values := texts(claims, i.TenantClaim)
	for _, value := range values {
		name := value
		if len(i.Tenants) > 0 {
			name = i.Tenants[value]
		} else if name == AllTenants {
			continue // whoever may set the claim is not asked whether all may be seen
		}
		switch {
		case name == AllTenants:
			c.all = true
		case CheckTenant(name) == nil && len(c.tenants) < maxTenants:
			c.belong(name)
		}
	}
	// A claim whose values mean nothing gives nothing.
	c.belongs(len(values) > 0 || hasClaim(claims, i.TenantClaim))
	until := now.Add(cacheFor)
	if end := t.Expiry.Add(skew); end.Before(until) {
		until = end
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.known) >= maxCached {
		clear(i.known)
	}
	i.known[sum] = verified{c, until}
	return c, nil
}

// claim finds a claim by name, or by a path of names within each other.
func claim(claims map[string]any, path string) (any, bool) {
	if v, ok := claims[path]; ok {
		return v, true
	}
	first, rest, ok := strings.Cut(path, ".")
	if !ok {
		return nil, false
	}
	inner, _ := claims[first].(map[string]any)
	return claim(inner, rest)
}

func hasClaim(claims map[string]any, path string) bool {
	v, ok := claim(claims, path)
	return ok && v != nil
}

// texts are the values of a claim that is a text or a list of texts.
func texts(claims map[string]any, path string) []string {
	v, _ := claim(claims, path)
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		var out []string
		for _, e := range v {
			if s, ok := e.(string); ok {
				out = append(out, s)
			}
		}
		return out
	}
	return nil
}

// errNoKeys says that the issuer's keys cannot be had.
var errNoKeys = errors.New("the issuer's keys cannot be had")

// keySet are the keys of an issuer. They follow the issuer when it changes them, and last for
// a while when it does not answer.
type keySet struct {
	issuer string
	log    *slog.Logger
	client *http.Client

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time
	asked   time.Time
	flight  chan struct{} // closed when the fetch under way ends
}

func (k *keySet) empty() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.keys) == 0 || time.Since(k.fetched) > keysUsable
}

// VerifySignature implements oidc.KeySet.
func (k *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil || len(jws.Signatures) != 1 {
		return nil, errors.New("malformed")
	}
	keys, fresh := k.current()
	if payload, ok := verifyWith(jws, keys); ok {
		if !fresh {
			k.fetch(context.WithoutCancel(ctx), false)
		}
		return payload, nil
	}
	// The issuer may have new keys.
	k.fetch(ctx, true)
	again, _ := k.current()
	if payload, ok := verifyWith(jws, again); ok {
		return payload, nil
	}
	if len(again) == 0 {
		return nil, errNoKeys
	}
	return nil, errors.New("no key of the issuer signed it")
}

func (k *keySet) current() (keys []jose.JSONWebKey, fresh bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	age := time.Since(k.fetched)
	if age > keysUsable {
		return nil, false
	}
	return k.keys, age < keysFresh
}

func verifyWith(jws *jose.JSONWebSignature, keys []jose.JSONWebKey) ([]byte, bool) {
	id := jws.Signatures[0].Header.KeyID
	for i := range keys {
		if id != "" && keys[i].KeyID != id {
			continue
		}
		if payload, err := jws.Verify(&keys[i]); err == nil {
			return payload, true
		}
	}
	return nil, false
}

// fetch asks the issuer for its keys, unless somebody did not long ago; wait says to wait for
// the answer.
func (k *keySet) fetch(ctx context.Context, wait bool) {
	k.mu.Lock()
	if k.flight == nil {
		if time.Since(k.asked) < askAfter {
			k.mu.Unlock()
			return
		}
		k.asked = time.Now()
		flight := make(chan struct{})
		k.flight = flight
		go func() {
			// Others wait for the answer, too: it is not the caller's to break off.
			keys, err := k.ask(context.WithoutCancel(ctx))
			k.mu.Lock()
			defer k.mu.Unlock()
			if err != nil {
				k.log.Warn("the issuer of tokens gives no keys", "issuer", k.issuer, "error", err)
			} else {
				k.keys, k.fetched = keys, time.Now()
			}
			k.flight = nil
			close(flight)
		}()
	}
	flight := k.flight
	k.mu.Unlock()
	if !wait {
		return
	}
	select {
	case <-flight:
	case <-ctx.Done():
	}
}

// ask reads the issuer's document, and its keys.
func (k *keySet) ask(ctx context.Context) ([]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(oidc.ClientContext(ctx, k.client), 15*time.Second)
	defer cancel()
	provider, err := oidc.NewProvider(ctx, k.issuer)
	if err != nil {
		return nil, err
	}
	var document struct {
		JWKS string `json:"jwks_uri"`
	}
	if err := provider.Claims(&document); err != nil {
		return nil, err
	}
	u, err := url.Parse(document.JWKS)
	if err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || mesh.CheckInsecure(u.Host) != nil) {
		return nil, errors.New("its jwks_uri is no https URL")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, document.JWKS, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", document.JWKS, resp.Status)
	}
	var set jose.JSONWebKeySet
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		return nil, fmt.Errorf("%s is no set of keys: %w", document.JWKS, err)
	}
	// A key for encryption signs nothing; a secret in a public document is none.
	set.Keys = slices.DeleteFunc(set.Keys, func(key jose.JSONWebKey) bool {
		return !key.Valid() || !key.IsPublic() || key.Use != "" && key.Use != "sig"
	})
	if len(set.Keys) == 0 || len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("%s has %d keys that sign", document.JWKS, len(set.Keys))
	}
	return set.Keys, nil
}

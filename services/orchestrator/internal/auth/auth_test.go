package auth_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/golang-jwt/jwt/v5"
	"github.com/oauth2-proxy/mockoidc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

func newToken(t *testing.T) string {
	t.Helper()
	token, err := mesh.NewToken()
	require.NoError(t, err)
	return token
}

type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestTokensOfAFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	ci, ops, old, boss := newToken(t), newToken(t), newToken(t), newToken(t)
	write(t, path, fmt.Sprintf(`# people and machines
- {subject: ci, role: operator, tenant: acme, hash: "%s"}
- {subject: ops, role: viewer, tenants: [acme, globex], hash: "%s"}
- {subject: old, role: admin, expires: 2020-01-01, hash: "%s"}
- {subject: boss, role: admin, hash: "%s"}
`, mesh.HashToken(ci), mesh.HashToken(ops), mesh.HashToken(old), mesh.HashToken(boss)))
	log := &logs{}
	a, err := auth.New(auth.Options{Tokens: path, Logger: slog.New(slog.NewTextHandler(log, nil))})
	require.NoError(t, err)
	find := func(token string) (*auth.Caller, error) { return a.Authenticate(t.Context(), token, "192.0.2.1") }

	c, err := find(ci)
	require.NoError(t, err)
	require.Equal(t, []any{"ci", auth.Operator, []string{"acme"}}, []any{c.Subject, c.Role, c.Tenants()})
	require.True(t, c.Sees("acme"))
	require.False(t, c.Sees("globex") || c.Sees(""))
	_, err = c.ActingFor("globex")
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = c.ActingFor("no\ttenant")
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	require.NoError(t, c.May(auth.Viewer))
	require.ErrorContains(t, c.May(auth.Admin), "needs the role admin")

	c, err = find(ops)
	require.NoError(t, err)
	_, err = c.Tenant()
	require.Equal(t, codes.InvalidArgument, status.Code(err), "one of two has to be chosen")
	c, err = c.ActingFor("globex")
	require.NoError(t, err)
	require.Equal(t, []string{"globex"}, c.Tenants())
	require.False(t, c.Sees("acme"), "who acts for one tenant sees no other")

	c, err = find(boss)
	require.NoError(t, err)
	require.Nil(t, c.Tenants())

	for _, wrong := range []string{"", old, ci + "x", mesh.HashToken(ci), strings.ToUpper(ci), strings.Repeat("x", 1<<20)} {
		_, err = find(wrong)
		require.Equal(t, codes.Unauthenticated, status.Code(err))
		require.NotContains(t, err.Error(), ci[:12])
	}
	none := &auth.Caller{}
	require.Error(t, none.May(auth.NoRole), "a method that no role opens is closed to all")
	require.Empty(t, none.Tenants())
	require.NotNil(t, none.Tenants())

	// A file that cannot be used changes nothing; one that can be does.
	write(t, path, "- {subject: ci, role: king, hash: x}")
	require.Eventually(t, func() bool { _, _ = find(boss); return strings.Contains(log.String(), "stay in force") }, 20*time.Second, 50*time.Millisecond)
	_, err = find(ci)
	require.NoError(t, err)
	write(t, path, fmt.Sprintf("- {subject: new, role: viewer, hash: %q}\n", mesh.HashToken(ops)))
	require.Eventually(t, func() bool { _, err := find(ci); return status.Code(err) == codes.Unauthenticated }, 20*time.Second, 50*time.Millisecond)
	c, err = find(ops)
	require.NoError(t, err)
	require.Equal(t, []any{"new", []string{""}}, []any{c.Subject, c.Tenants()}, "no tenant is named: what belongs to none")
	require.NotContains(t, log.String(), ci)
}

func TestFilesOfTokensThatAreRefused(t *testing.T) {
	t.Parallel()
	hash := mesh.HashToken("x")
	for text, says := range map[string]string{
		"- {subject: a, role: viewer, token: specql_secret}":                     "only its hash",
		"- {subject: a, role: viewer, hash: specql_secret}":                      "only its hash",
		"- {subject: a, role: viewer, hash: 'sha256:abc'}":                       "64 hexadecimal digits",
		"- {subject: a, role: root, hash: '" + hash + "'}":                       `line 1: "role": is viewer, operator or admin`,
		"- {subject: a, role: viewer}":                                           "needs subject, role and hash",
		"- {subject: '', role: viewer, hash: '" + hash + "'}":                    "subject",
		"- {subject: a, role: viewer, tenants: [], hash: '" + hash + "'}":        "between 1",
		"- {subject: a, role: viewer, tenants: [\"a b\"], hash: '" + hash + "'}": "a tenant has",
		"- {subject: a, role: viewer, expires: soon, hash: '" + hash + "'}":      "is no time",
		"- {subject: a, role: viewer, subject: b, hash: '" + hash + "'}":         "twice",
		"- {subject: a, role: viewer, roles: [], hash: '" + hash + "'}":          "no key of an entry",
		"a: b":                 "is a list",
		"- [":                  "not YAML",
		"- &a [*a]":            "an entry has",
		strings.Repeat("[", 9): "not YAML",
		"- {subject: a, role: viewer, hash: '" + hash + "'}\n- {subject: b, role: admin, hash: '" + hash + "'}": "line 2: the token of line 1 once more",
	} {
		path := filepath.Join(t.TempDir(), "tokens.yaml")
		write(t, path, text)
		_, err := auth.New(auth.Options{Tokens: path})
		require.ErrorContains(t, err, says, "%s", text)
		require.NotContains(t, err.Error(), "specql_secret")
	}
}

func TestWrongTokensOfOneAddressAreTurnedAway(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	good := newToken(t)
	write(t, path, fmt.Sprintf("- {subject: a, role: viewer, hash: %q}", mesh.HashToken(good)))
	now := time.Now()
	a, err := auth.New(auth.Options{Tokens: path, Now: func() time.Time { return now }})
	require.NoError(t, err)
	for range 50 {
		_, err = a.Authenticate(t.Context(), "wrong", "192.0.2.1")
		require.NotContains(t, err.Error(), "too many")
	}
	_, err = a.Authenticate(t.Context(), "wrong", "192.0.2.1")
	require.ErrorContains(t, err, "too many")
	_, err = a.Authenticate(t.Context(), good, "192.0.2.1")
	require.NoError(t, err, "who has a token is let in all the same")
	_, err = a.Authenticate(t.Context(), "wrong", "192.0.2.2")
	require.NotContains(t, err.Error(), "too many")
	now = now.Add(time.Minute)
	_, err = a.Authenticate(t.Context(), "wrong", "192.0.2.1")
	require.NotContains(t, err.Error(), "too many")
}

func TestTokensOfAnIssuer(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := lis.Addr().String()
	require.NoError(t, lis.Close())
	begin := func() *mockoidc.MockOIDC {
		key, err := mockoidc.RandomKeypair(2048)
		require.NoError(t, err)
		m, err := mockoidc.NewServer(key.PrivateKey)
		require.NoError(t, err)
		require.Eventually(t, func() bool { lis, err = net.Listen("tcp", address); return err == nil }, 20*time.Second, 20*time.Millisecond)
		require.NoError(t, m.Start(lis, nil))
		return m
	}
	now := time.Now()
	issuer := "http://" + address + "/oidc"
	a, err := auth.New(auth.Options{Now: func() time.Time { return now }, OIDC: &auth.OIDC{
		Issuer: issuer, Audience: "mesh", RolesClaim: "realm.roles",
		Roles: map[string]string{"Mesh Admins": "admin", "devs": "operator"}, Tenants: map[string]string{"t1": "acme", "group of t1": "acme", "all": "*"},
	}})
	require.NoError(t, err, "an issuer that is down keeps nobody from starting")
	claims := func(change map[string]any) jwt.MapClaims {
		c := jwt.MapClaims{
			"iss": issuer, "aud": []string{"other", "mesh"}, "sub": "ann", "exp": now.Add(time.Hour).Unix(),
			"realm": map[string]any{"roles": []string{"devs", "viewer"}}, "tenant": "t1",
		}
		for k, v := range change {
			if c[k] = v; v == nil {
				delete(c, k)
			}
		}
		return c
	}
	ask := func(token string) (*auth.Caller, error) { return a.Authenticate(t.Context(), token, "192.0.2.1") }
	m := begin()
	sign := func(m *mockoidc.MockOIDC, change map[string]any) string {
		token, err := m.Keypair.SignJWT(claims(change))
		require.NoError(t, err)
		return token
	}
	good := sign(m, nil)
	c, err := ask(good)
	require.NoError(t, err)
	require.Equal(t, []any{"ann", auth.Operator, []string{"acme"}}, []any{c.Subject, c.Role, c.Tenants()})

	public := m.Keypair.PublicKey
	pem, err := jose.JSONWebKey{Key: public}.MarshalJSON()
	require.NoError(t, err)
	confused, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims(nil)).SignedString(pem)
	require.NoError(t, err)
	unsigned, err := jwt.NewWithClaims(jwt.SigningMethodNone, claims(nil)).SignedString(jwt.UnsafeAllowNoneSignatureType)
	require.NoError(t, err)
	foreign, err := mockoidc.RandomKeypair(2048)
	require.NoError(t, err)
	stranger, err := foreign.SignJWT(claims(nil))
	require.NoError(t, err)
	for name, token := range map[string]string{
		"another issuer":       sign(m, map[string]any{"iss": "http://" + address}),
		"another audience":     sign(m, map[string]any{"aud": "other"}),
		"no audience":          sign(m, map[string]any{"aud": nil}),
		"ended":                sign(m, map[string]any{"exp": now.Add(-2 * time.Minute).Unix()}),
		"without an end":       sign(m, map[string]any{"exp": nil}),
		"not yet":              sign(m, map[string]any{"nbf": now.Add(3 * time.Minute).Unix()}),
		"not in any time":      sign(m, map[string]any{"nbf": 1e300}),
		"of two lines":         sign(m, map[string]any{"sub": "ann\nroot"}),
		"of no text":           sign(m, map[string]any{"sub": "ann\x00"}),
		"of nobody":            sign(m, map[string]any{"sub": nil}),
		"of a key of others":   stranger,
		"signed by a secret":   confused,
		"unsigned":             unsigned,
		"with another payload": good[:strings.Index(good, ".")+1] + strings.Split(sign(m, map[string]any{"sub": "eve"}), ".")[1] + good[strings.LastIndex(good, "."):],
		"damaged":              good[:len(good)-8],
	} {
		_, err := ask(token)
		require.Equal(t, codes.Unauthenticated, status.Code(err), "%s: %v", name, err)
		require.Equal(t, "a valid token is needed (--token, SPECQL_TOKEN or the metadata authorization: Bearer TOKEN)", status.Convert(err).Message(), name)
	}
	c, err = ask(sign(m, map[string]any{"exp": now.Add(-30 * time.Second).Unix(), "nbf": now.Add(30 * time.Second).Unix(), "realm": map[string]any{"roles": "Mesh Admins"}, "tenant": []string{"*", "all"}}))
	require.NoError(t, err, "clocks may be a little apart")
	require.Nil(t, c.Tenants())
	require.Equal(t, auth.Admin, c.Role)
	c, err = ask(sign(m, map[string]any{"realm": nil, "tenant": "*"}))
	require.NoError(t, err)
	require.Equal(t, auth.NoRole, c.Role)
	require.Equal(t, []string{}, c.Tenants(), "a tenant that means nothing opens nothing")
	_, err = c.Tenant()
	require.Equal(t, codes.PermissionDenied, status.Code(err), "there is none to choose")
	c, err = ask(sign(m, map[string]any{"tenant": []string{"t1", "group of t1", "t1"}}))
	require.NoError(t, err)
	tenant, err := c.Tenant()
	require.NoError(t, err, "one tenant by several names")
	require.Equal(t, "acme", tenant)

	// An issuer that is down: what was signed with known keys is taken, and with its new keys when it is back.
	require.NoError(t, m.Shutdown())
	_, err = ask(sign(m, map[string]any{"sub": "bob"}))
	require.NoError(t, err)
	rotated := begin()
	defer func() { require.NoError(t, rotated.Shutdown()) }()
	token := sign(rotated, map[string]any{"sub": "carl"})
	require.Eventually(t, func() bool { c, err := ask(token); return err == nil && c.Subject == "carl" }, 60*time.Second, time.Second)
	now = now.Add(time.Hour + 2*time.Minute)
	_, err = ask(good)
	require.Equal(t, codes.Unauthenticated, status.Code(err), "what was known to be valid ends, too")
}

func TestAnIssuerThatIsDownIsUnavailable(t *testing.T) {
	t.Parallel()
	a, err := auth.New(auth.Options{OIDC: &auth.OIDC{Issuer: "http://127.0.0.1:1", Audience: "mesh"}})
	require.NoError(t, err)
	key, err := mockoidc.RandomKeypair(2048)
	require.NoError(t, err)
	token, err := key.SignJWT(jwt.MapClaims{"iss": "http://127.0.0.1:1"})
	require.NoError(t, err)
	for range 3 {
		_, err = a.Authenticate(context.Background(), token, "192.0.2.1")
		require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	}
	for issuer, says := range map[string]string{"http://login.example.com": "https", "login.example.com": "no URL", "https://u:p@h": "no URL"} {
		_, err = auth.New(auth.Options{OIDC: &auth.OIDC{Issuer: issuer, Audience: "mesh"}})
		require.ErrorContains(t, err, says)
	}
	_, err = auth.New(auth.Options{OIDC: &auth.OIDC{Issuer: "https://login.example.com"}})
	require.ErrorContains(t, err, "audience")
}

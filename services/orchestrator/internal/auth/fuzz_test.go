package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/telemetry"
)

// requireSound holds what is true of everybody who was let in.
func requireSound(t *testing.T, c *Caller) {
	t.Helper()
	require.NotEmpty(t, c.Subject)
	require.LessOrEqual(t, len(c.Subject), maxSubject)
	require.False(t, strings.ContainsFunc(c.Subject, unicode.IsControl), "%q is no one line", c.Subject)
	require.True(t, c.Role >= NoRole && c.Role <= Admin)
	require.LessOrEqual(t, len(c.tenants), maxTenants)
	for _, tenant := range c.tenants {
		if tenant != "" {
			require.NoError(t, CheckTenant(tenant))
		}
	}
	if c.all {
		require.Nil(t, c.Tenants())
	} else {
		require.NotNil(t, c.Tenants())
	}
	_, _ = c.Tenant()
}

// FuzzTokens reads a file of tokens.
func FuzzTokens(f *testing.F) {
	hash := mesh.HashToken("x")
	for _, text := range []string{
		"- {subject: ci, role: operator, tenant: acme, hash: '" + hash + "', expires: 2027-01-31}",
		"- {subject: a, role: admin, tenants: [acme, '*'], hash: '" + hash + "', expires: 2027-01-31T12:00:00Z}\n- {subject: b, role: viewer, hash: '" + hash + "'}",
		"- {subject: a, role: viewer, token: secret}", "- &a [*a]", "---\n- {}\n---\n- {}\n", "null", "!!null x", "[[[[[[[[[[", "- <<: {subject: a}",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		byHash, err := parseTokens(text)
		if err != nil {
			require.LessOrEqual(t, len(err.Error()), 20*1000)
			return
		}
		require.LessOrEqual(t, len(byHash), maxTokens)
		for _, c := range byHash {
			require.NotEqual(t, NoRole, c.Role)
			requireSound(t, c)
		}
	})
}

// FuzzClaims verifies tokens whose claims are hostile though the issuer signed them, and tokens that it did not sign.
func FuzzClaims(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(f, err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	require.NoError(f, err)
	const issuerURL = "http://127.0.0.1:1"
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	newFuzzed := func(roles, tenants map[string]string) *issuer {
		i, err := newIssuer(OIDC{Issuer: issuerURL, Audience: "mesh", RolesClaim: "realm.roles", Roles: roles, Tenants: tenants}, telemetry.OrDiscard(nil), func() time.Time { return now })
		require.NoError(f, err)
		i.keys.keys, i.keys.fetched, i.keys.asked = []jose.JSONWebKey{{Key: key.Public()}}, time.Now().Add(24*time.Hour), time.Now().Add(24*time.Hour)
		return i
	}
	plain := newFuzzed(nil, nil)
	mapped := newFuzzed(map[string]string{"devs": "operator"}, map[string]string{"t1": "acme", "all": "*"})
	const head = `{"iss":"` + issuerURL + `","aud":"mesh","sub":"ann","exp":1893456000`
	for _, claims := range []string{
		head + `,"realm":{"roles":["admin","devs"]},"tenant":["acme","all","*"]}`, head + `,"realm.roles":"viewer","tenant":{"a":1}}`, head + `,"nbf":1e300,"realm":[]}`,
		`{"iss":"` + issuerURL + `","aud":"mesh","sub":"ann\u0000\nroot","exp":1893456000}`,
		`{"iss":"` + issuerURL + `","aud":["mesh","x"],"sub":"a\nb","exp":1e300}`, `{"exp":"never"}`, `[]`, `null`, `{"iss":null,"aud":[[]],"sub":{}}`,
	} {
		f.Add(`{"alg":"ES256"}`, []byte(claims), true)
		f.Add(`{"alg":"none"}`, []byte(claims), false)
	}
	f.Add(`{"alg":"HS256","jwk":{"kty":"oct","k":"AA"},"crit":["b64"],"b64":false}`, []byte(head+"}"), false)
	f.Fuzz(func(t *testing.T, header string, claims []byte, signed bool) {
		encode := base64.RawURLEncoding.EncodeToString
		token := encode([]byte(header)) + "." + encode(claims) + "." + encode([]byte(fmt.Sprint(signed)))
		if signed {
			jws, err := signer.Sign(claims)
			require.NoError(t, err)
			token, err = jws.CompactSerialize()
			require.NoError(t, err)
		}
		for _, i := range []*issuer{plain, mapped} {
			c, err := i.verify(t.Context(), token, sha256.Sum256([]byte(token)), now)
			if err != nil {
				continue
			}
			require.True(t, signed, "nobody signed it")
			requireSound(t, c)
			if c.all && c.Role != Admin {
				require.NotNil(t, i.Tenants["all"], "only a mapping gives all tenants")
			}
		}
	})
}

// FuzzAuthenticate takes tokens as they come.
func FuzzAuthenticate(f *testing.F) {
	a, err := New(Options{OIDC: &OIDC{Issuer: "http://127.0.0.1:1", Audience: "mesh"}})
	require.NoError(f, err)
	a.issuer.keys.asked = time.Now().Add(24 * time.Hour)
	f.Add("a.b.c", "192.0.2.1")
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AA", "[::1]:5")
	f.Fuzz(func(t *testing.T, token, remote string) {
		_, err := a.Authenticate(t.Context(), token, Host(remote))
		require.Error(t, err, "nobody gave it")
		require.Contains(t, []codes.Code{codes.Unauthenticated, codes.Unavailable}, status.Code(err))
	})
}

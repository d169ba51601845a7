package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/mesh"
)

// BenchmarkAuthenticate is what a call pays for the check of its token: one of a file of 1,000, one of an issuer that was
// verified within the last minute, one of an issuer that is verified now, and one that is nobody's.
func BenchmarkAuthenticate(b *testing.B) {
	var text strings.Builder
	var known string
	for n := range 1000 {
		token, err := mesh.NewToken()
		require.NoError(b, err)
		known = token
		_, _ = fmt.Fprintf(&text, "- {subject: s%d, role: viewer, hash: %q}\n", n, mesh.HashToken(token))
	}
	path := filepath.Join(b.TempDir(), "tokens.yaml")
	require.NoError(b, os.WriteFile(path, []byte(text.String()), 0o600))
	const issuerURL = "http://127.0.0.1:1"
	a, err := New(Options{Tokens: path, OIDC: &OIDC{Issuer: issuerURL, Audience: "mesh"}})
	require.NoError(b, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(b, err)
	a.issuer.keys.keys, a.issuer.keys.fetched, a.issuer.keys.asked = []jose.JSONWebKey{{Key: key.Public()}}, time.Now().Add(time.Hour), time.Now().Add(time.Hour)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	require.NoError(b, err)
	jws, err := signer.Sign(fmt.Appendf(nil, `{"iss":%q,"aud":"mesh","sub":"ann","exp":%d,"roles":["viewer"]}`, issuerURL, time.Now().Add(time.Hour).Unix()))
	require.NoError(b, err)
	issued, err := jws.CompactSerialize()
	require.NoError(b, err)
	for _, c := range []struct {
		name, token string
		known       bool
		before      func()
	}{
		{"file", known, true, nil},
		{"issuer", issued, true, nil},
		{"issuer, verified each time", issued, true, func() { a.issuer.mu.Lock(); clear(a.issuer.known); a.issuer.mu.Unlock() }},
		{"nobody's", "wrong", false, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if c.before != nil {
					c.before()
				}
				if _, err := a.Authenticate(b.Context(), c.token, "192.0.2.1"); (err == nil) != c.known {
					b.Fatal(err)
				}
			}
		})
	}
}

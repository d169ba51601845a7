package runner

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// TestNoSecretSurvives: whatever a secret is and wherever it stands, it is not in the
// masked text, and masked JSON is JSON of the same shape.
func TestNoSecretSurvives(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		secret := rapid.StringMatching(`[^*]{4,40}`).Filter(func(s string) bool { return len(strings.TrimSpace(s)) >= shortestSecret }).Draw(t, "secret")
		before, after := rapid.String().Draw(t, "before"), rapid.String().Draw(t, "after")
		var m masker
		m.add(secret)
		require.NotContains(t, m.text(before+secret+after), secret)

		raw, err := json.Marshal(map[string]any{"list": []any{before + secret + after, 1.5, nil, true}, "n": json.Number("12345678901234567890")})
		require.NoError(t, err)
		got, err := m.value(raw)
		require.NoError(t, err)
		v, err := decodeAny(got)
		require.NoError(t, err)
		require.NotContains(t, fmt.Sprint(v), secret)
	})
}

func TestMaskingLeavesTheRestAlone(t *testing.T) {
	t.Parallel()
	var m masker
	raw := json.RawMessage(`{ "b":1.10, "a":"x" }`)
	got, err := m.value(raw)
	require.NoError(t, err)
	require.Equal(t, string(raw), string(got))
	m.add("secret-value")
	m.add("sec") // too short
	m.add("")
	got, err = m.value(raw)
	require.NoError(t, err)
	require.Equal(t, string(raw), string(got), "without a hit not a byte changes")
	require.Equal(t, "a sec in ***", m.text("a sec in secret-value"))

	// Hidden by escapes.
	got, err = m.value(json.RawMessage(`{"a":"\u0073ecret-value","n":1.10}`))
	require.NoError(t, err)
	require.JSONEq(t, `{"a":"***","n":1.10}`, string(got))
}

func BenchmarkMask(b *testing.B) {
	var m masker
	m.add("sk_test_4eC39HqLyjWDarjtT1zdp7dc")
	line := strings.Repeat("an ordinary line of a log ", 8)
	b.SetBytes(int64(len(line)))
	for b.Loop() {
		m.text(line)
	}
}

func FuzzCheckSchema(f *testing.F) {
	f.Add([]byte(SchemaOf[sampleConfig]()), []byte(`{"base_url":"x","headers":{"a":1}}`))
	f.Add([]byte(`{"anyOf":[{"type":"string"},{"$ref":"#"}]}`), []byte(`[]`))
	f.Fuzz(func(_ *testing.T, schema, value []byte) {
		CheckSchema(schema, value, "x")
	})
}

// TestEveryFormIsMasked: a secret is found in the forms in which a service that was given it
// tends to give it back.
func TestEveryFormIsMasked(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		secret := rapid.StringMatching(`[A-Za-z0-9/+=_@:<>&" -]{12,40}`).Filter(func(s string) bool { return len(strings.TrimSpace(s)) >= 12 }).Draw(t, "secret")
		before, after := rapid.StringMatching(`[a-z:]{0,9}`).Draw(t, "before"), rapid.StringMatching(`[a-z:]{0,9}`).Draw(t, "after")
		var m masker
		m.add(secret)
		escaped := url.QueryEscape(secret)
		for form, text := range map[string]string{
			"url": escaped, "url in small letters": lowerEscapes(escaped), "path": url.PathEscape(secret),
			"hex": hex.EncodeToString([]byte(secret)), "HEX": strings.ToUpper(hex.EncodeToString([]byte(secret))),
		} {
			require.Equal(t, "a "+masked+" b", m.text("a "+text+" b"), form)
		}
		// In base64 what the neighbours decide, too, may be left: at most two letters at each end.
		for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawURLEncoding} {
			whole := encoding.EncodeToString([]byte(before + secret + after))
			shown := m.text(whole)
			require.Contains(t, shown, masked, whole)
			rest := strings.Replace(shown, masked, "", 1)
			most := len(encoding.EncodeToString([]byte(before))) + len(encoding.EncodeToString([]byte(after))) + 4
			require.LessOrEqual(t, len(rest), most, "%s shows %s", whole, shown)
		}
	})
}

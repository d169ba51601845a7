package httprunner

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzPlainOutput: what is written by hand is what encoding/json writes.
func FuzzPlainOutput(f *testing.F) {
	for _, s := range []string{"", "plain", `"\`, "\n\x00\x1f\x7f", "é\u2028<&>", "\xff", "{}"} {
		f.Add(s, "X-A", s, 200)
		f.Add("body", s, "value", -1)
	}
	f.Fuzz(func(t *testing.T, body, name, value string, status int) {
		for _, encoding := range []string{"", "base64"} {
			out := plainOutput{Body: body, BodyEncoding: encoding, StatusCode: status, Headers: map[string]string{name: value, "A": body, "Z": ""}}
			var want bytes.Buffer
			e := json.NewEncoder(&want)
			e.SetEscapeHTML(false)
			require.NoError(t, e.Encode(out))
			have, err := out.encode()
			require.Nil(t, err)
			require.Equal(t, string(bytes.TrimSpace(want.Bytes())), string(have))
		}
	})
}

package httprunner

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"mime"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/specql/mesh/pkg/fault"
)

// plainOutput is the output of a body that is not JSON.
type plainOutput struct {
	Body string `json:"body"`
	// BodyEncoding is base64 for a body that is not text, else absent.
	BodyEncoding string            `json:"body_encoding,omitempty"`
	StatusCode   int               `json:"status_code"`
	Headers      map[string]string `json:"headers"`
}

// outputOf gives a JSON body as it is, numbers in all their digits, and anything else as body,
// status_code and headers. An object or array without a JSON content type counts as JSON.
func outputOf(res *http.Response, body []byte) (json.RawMessage, *fault.Error) {
	text := bytes.TrimSpace(bytes.TrimPrefix(body, []byte("\xef\xbb\xbf")))
	if len(text) > 0 && (isJSON(res.Header.Get("Content-Type")) || text[0] == '{' || text[0] == '[') && json.Valid(text) {
		return bytes.ToValidUTF8(text, []byte("\uFFFD")), nil
	}
	out := plainOutput{Body: string(body), StatusCode: res.StatusCode, Headers: map[string]string{}}
	if !utf8.Valid(body) {
		out.Body, out.BodyEncoding = base64.StdEncoding.EncodeToString(body), "base64"
	}
	for name, values := range res.Header {
		if name == "Set-Cookie" { // a credential
			continue
		}
		out.Headers[name] = strings.ToValidUTF8(strings.Join(values, ", "), "\uFFFD")
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(out); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the answer cannot be written as JSON")
	}
	return bytes.TrimSpace(b.Bytes()), nil
}

func isJSON(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		media, _, _ = strings.Cut(contentType, ";")
		media = strings.ToLower(strings.TrimSpace(media))
	}
	return media == "application/json" || strings.HasSuffix(media, "+json") || media == "text/json"
}

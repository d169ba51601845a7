package httprunner

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"mime"
	"net/http"
	"slices"
	"strconv"
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
	return out.encode()
}

// encode writes the output as encoding/json does, which takes several times as long for what most answers are: plain text.
func (o plainOutput) encode() (json.RawMessage, *fault.Error) {
	b := make([]byte, 0, 64+len(o.Body)+64*len(o.Headers))
	var err error
	text := func(s string) {
		if err == nil {
			b, err = appendText(b, s)
		}
	}
	b = append(b, `{"body":`...)
	text(o.Body)
	if o.BodyEncoding != "" {
		b = append(b, `,"body_encoding":`...)
		text(o.BodyEncoding)
	}
	b = append(b, `,"status_code":`...)
	b = strconv.AppendInt(b, int64(o.StatusCode), 10)
	b = append(b, `,"headers":{`...)
	names := make([]string, 0, len(o.Headers))
	for name := range o.Headers {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if i > 0 {
			b = append(b, ',')
		}
		text(name)
		b = append(b, ':')
		text(o.Headers[name])
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the answer cannot be written as JSON")
	}
	return append(b, "}}"...), nil
}

// appendText adds a text in JSON, with nothing escaped for HTML.
func appendText(b []byte, s string) ([]byte, error) {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			var text bytes.Buffer
			e := json.NewEncoder(&text)
			e.SetEscapeHTML(false)
			if err := e.Encode(s); err != nil {
				return nil, err //nolint:wrapcheck // by the caller
			}
			return append(b, bytes.TrimSuffix(text.Bytes(), []byte("\n"))...), nil
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"'), nil
}

func isJSON(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		media, _, _ = strings.Cut(contentType, ";")
		media = strings.ToLower(strings.TrimSpace(media))
	}
	return media == "application/json" || strings.HasSuffix(media, "+json") || media == "text/json"
}

package httprunner

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/fault"
)

func TestRequestShapes(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	r := newRunner(t, Options{})
	tests := []struct {
		name        string
		base        string
		op          object
		input       string
		method, uri string
		body        string
		contentType string
	}{
		{"defaults", "", nil, `{"amount":12345678901234567890}`, "POST", "/do_it", `{"amount":12345678901234567890}`, "application/json"},
		{"no input", "", nil, `{}`, "POST", "/do_it", `{}`, "application/json"},
		{"path field leaves the body", "/v1/", object{"path": "/c/{id}/x"}, `{"id":"a/b c","n":1.50,"s":"<&>"}`, "POST", "/v1/c/a%2Fb%20c/x", `{"n":1.50,"s":"<&>"}`, "application/json"},
		{"path without slash", "/v1", object{"path": "charges"}, `{}`, "POST", "/v1/charges", `{}`, "application/json"},
		{"path keeps slashes", "", object{"path": "/b/{+key}", "method": "PUT", "body": "raw"}, `{"key":"a b/c.csv","content":"1,2\n"}`, "PUT", "/b/a%20b/c.csv", "1,2\n", "text/plain; charset=utf-8"},
		{"number and boolean in path", "", object{"path": "/{a}/{b}", "body": "none"}, `{"a":10.50,"b":true}`, "POST", "/10.50/true", "", ""},
		{"unicode path", "", object{"path": "/bücher/{x}", "body": "none"}, `{"x":"ö%2F"}`, "POST", "/b%C3%BCcher/%C3%B6%252F", "", ""},
		{"get sends the rest as query", "", object{"method": "GET", "path": "/s/{id}"}, `{"id":7,"q":"a b&c","tags":["x","y"],"f":{"k":1},"none":null}`, "GET", "/s/7?f[k]=1&q=a+b%26c&tags=x&tags=y", "", ""},
		{"delete sends the rest as JSON", "", object{"method": "DELETE", "path": "/s/{id}"}, `{"id":7,"why":"x"}`, "DELETE", "/s/7", `{"why":"x"}`, "application/json"},
		{"delete sends the whole input as JSON", "", object{"method": "DELETE", "path": "/s"}, `{"ids":[1,2]}`, "DELETE", "/s", `{"ids":[1,2]}`, "application/json"},
		{"delete without rest has no body", "", object{"method": "DELETE", "path": "/s/{id}"}, `{"id":7}`, "DELETE", "/s/7", "", ""},
		{"delete with a body that was asked for", "", object{"method": "DELETE", "path": "/s/{id}", "body": "json"}, `{"id":7}`, "DELETE", "/s/7", `{}`, "application/json"},
		{"head sends the rest as query", "", object{"method": "HEAD", "path": "/s/{id}"}, `{"id":7,"q":1}`, "HEAD", "/s/7?q=1", "", ""},
		{"get without rest", "", object{"method": "GET", "body": "none"}, `{"q":1}`, "GET", "/do_it", "", ""},
		{
			"query", "/v1?api-version=3",
			object{"path": "/x?fixed=1&q={term}", "query": object{"limit": "{limit}", "a": []any{"1", 2, true}, "gone": "{missing}", "t": "at {place}"}},
			`{"term":"a&b","limit":10,"place":"home","left":1}`, "POST", "/v1/x?api-version=3&fixed=1&q=a%26b&a=1&a=2&a=true&limit=10&t=at+home", `{"left":1}`, "application/json",
		},
		{"query list", "", object{"method": "GET", "query": object{"id": "{ids}"}}, `{"ids":[1,"b",null]}`, "GET", "/do_it?id=1&id=b", "", ""},
		{"null and nothing leave the body", "", object{"query": object{"a": "{n}", "b": "{e}"}}, `{"n":null,"e":[],"x":1}`, "POST", "/do_it", `{"x":1}`, "application/json"},
		{"json in query is text", "", object{"query": object{"filter": `{"a": 1}`}}, `{}`, "POST", "/do_it?filter=%7B%22a%22%3A+1%7D", `{}`, "application/json"},
		{
			"form", "",
			object{"body": "form"},
			`{"amount":2000,"metadata":{"order id":"6","deep":{"x":true}},"items":[{"price":"p1"},{"price":"p2"}],"expand":["a","b"],"none":null,"e":{}}`,
			"POST", "/do_it", "amount=2000&expand[0]=a&expand[1]=b&items[0][price]=p1&items[1][price]=p2&metadata[deep][x]=true&metadata[order+id]=6", "application/x-www-form-urlencoded",
		},
		{"raw body", "", object{"body": "raw", "headers": object{"Content-Type": "text/csv"}}, `{"body":"a,b","other":1}`, "POST", "/do_it", "a,b", "text/csv"},
		{"raw base64", "", object{"body": "raw"}, `{"body_base64":"AAEC","other":1}`, "POST", "/do_it", "\x00\x01\x02", "application/octet-stream"},
		{"raw value", "", object{"body": "raw"}, `{"body":{"a":[1]}}`, "POST", "/do_it", `{"a":[1]}`, "application/json"},
		{"raw nothing", "", object{"body": "raw"}, `{}`, "POST", "/do_it", "", ""},
		{"head", "", object{"method": "HEAD", "path": "/"}, `{}`, "HEAD", "/", "", ""},
		{"empty path with query", "/v1", object{"method": "GET", "path": "?a=1"}, `{}`, "GET", "/v1?a=1", "", ""},
		{"field in header", "", object{"headers": object{"X-Tenant": "{tenant}", "X-Gone": "{gone}", "X-Two": 2}}, `{"tenant":"acme","x":1}`, "POST", "/do_it", `{"x":1}`, "application/json"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			attempt{config: object{"base_url": rec.URL + tt.base}, op: tt.op, input: tt.input}.ok(t, r)
			got := rec.last(t)
			require.Equal(t, tt.method, got.Method)
			require.Equal(t, tt.uri, got.URI)
			require.Equal(t, tt.body, got.Body)
			require.Equal(t, tt.contentType, got.Header.Get("Content-Type"))
			require.Equal(t, "key-1", got.Header.Get("Idempotency-Key"))
			if tt.name == "field in header" {
				require.Equal(t, "acme", got.Header.Get("X-Tenant"))
				require.Equal(t, "2", got.Header.Get("X-Two"))
				require.NotContains(t, got.Header, "X-Gone")
			}
		})
	}
}

func TestHeadersOfTheOperationGoOverThoseOfTheService(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	attempt{
		config: object{"base_url": rec.URL, "headers": object{"x-a": "service", "X-B": "service", "Idempotency-Key": "own-{n}"}},
		op:     object{"headers": object{"X-A": "operation", "User-Agent": "me"}},
		input:  `{"n":5}`,
	}.ok(t, newRunner(t, Options{}))
	got := rec.last(t).Header
	require.Equal(t, []string{"operation"}, got.Values("X-A"))
	require.Equal(t, []string{"service"}, got.Values("X-B"))
	require.Equal(t, []string{"own-5"}, got.Values("Idempotency-Key"))
	require.Equal(t, []string{"me"}, got.Values("User-Agent"))
}

func TestTraceContextIsSent(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	result := attempt{config: object{"base_url": rec.URL}}.run(trace.ContextWithSpanContext(t.Context(), span), t, newRunner(t, Options{}))
	require.NoError(t, result.Err)
	require.Equal(t, "00-01000000000000000000000000000000-0200000000000000-01", rec.last(t).Header.Get("Traceparent"))
}

func TestBaseURLOfTheEnvironment(t *testing.T) {
	rec := record(t, nil)
	r := newRunner(t, Options{})
	a := attempt{name: "stripe-api.v2", config: object{}}
	err := a.fails(t, r, fault.Validation)
	require.Contains(t, err.Message, "SPECQL_STRIPE_API_V2_BASE_URL")
	t.Setenv("SPECQL_STRIPE_API_V2_BASE_URL", rec.URL+"/v1")
	a.ok(t, r)
	require.Equal(t, "/v1/do_it", rec.last(t).URI)
	t.Setenv("SPECQL_STRIPE_API_V2_BASE_URL", "not a url")
	err = a.fails(t, r, fault.Validation)
	require.Contains(t, err.Message, "SPECQL_STRIPE_API_V2_BASE_URL")
}

func TestOutputs(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		handler http.HandlerFunc
		op      object
		want    string
	}{
		{"json keeps its digits", jsonAnswer(` {"n":12345678901234567890.10,"a":[1e400]} `), nil, `{"n":12345678901234567890.10,"a":[1e400]}`},
		{"json array", jsonAnswer(`[1,2]`), nil, `[1,2]`},
		{"json scalar", jsonAnswer(`"x"`), nil, `"x"`},
		{"json suffix", answer(201, "application/problem+json; charset=utf-8", `{"a":1}`), nil, `{"a":1}`},
		{"json without its type", answer(200, "text/plain", `{"a":1}`), nil, `{"a":1}`},
		{"byte order mark", jsonAnswer("\xef\xbb\xbf{}"), nil, `{}`},
		{"broken utf-8 in json", jsonAnswer("{\"a\":\"\xff\"}"), nil, `{"a":"` + "\uFFFD" + `"}`},
		{"text", answer(200, "text/plain", "12", "X-Multi", "a"), nil, `{"body":"12","status_code":200,"headers":{"Content-Length":"2","Content-Type":"text/plain","X-Multi":"a"}}`},
		{"html", answer(200, "text/html", "<b>"), nil, `{"body":"<b>","status_code":200,"headers":{"Content-Length":"3","Content-Type":"text/html"}}`},
		{"json type, other body", jsonAnswer("oops"), nil, `{"body":"oops","status_code":200,"headers":{"Content-Length":"4","Content-Type":"application/json"}}`},
		{"binary", answer(200, "image/png", "\x89PNG\xff"), nil, `{"body":"iVBOR/8=","body_encoding":"base64","status_code":200,"headers":{"Content-Length":"5","Content-Type":"image/png"}}`},
		{"cookies stay here", answer(200, "text/plain", "x", "Set-Cookie", "session=1"), nil, `{"body":"x","status_code":200,"headers":{"Content-Length":"1","Content-Type":"text/plain"}}`},
		{"success code", answer(404, "application/json", `{"found":false}`), object{"success_codes": []int{200, 404}}, `{"found":false}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rec := record(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"] = nil
				tt.handler(w, r)
			})
			got := attempt{config: object{"base_url": rec.URL}, op: tt.op}.ok(t, newRunner(t, Options{}))
			require.Equal(t, tt.want, got)
		})
	}
	t.Run("no content", func(t *testing.T) {
		t.Parallel()
		rec := record(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
		got := attempt{config: object{"base_url": rec.URL}}.ok(t, newRunner(t, Options{}))
		require.Contains(t, got, `{"body":"","status_code":204,"headers":{`)
	})
}

func TestUsage(t *testing.T) {
	t.Parallel()
	reply := `{"text":"` + strings.Repeat("x", 100_000) + `"}`
	rec := record(t, jsonAnswer(reply))
	r := newRunner(t, Options{})
	a := attempt{config: object{"base_url": rec.URL}, input: object{"text": strings.Repeat("y", 50_000)}}
	for range 3 { // the later ones on a kept connection
		u := a.run(t.Context(), t, r).Usage
		require.Equal(t, "http", u.GetSource())
		require.Equal(t, int32(200), u.GetStatusCode())
		require.InDelta(t, 50_011, u.GetRequestBytes(), 0)
		require.InDelta(t, len(reply), u.GetResponseBytes(), 0)
		require.Greater(t, u.GetDurationSeconds(), 0.0)
		require.InDelta(t, float64(len(reply))/mib, u.GetNetworkRxMb(), 0.002)
		require.InDelta(t, 50_011.0/mib, u.GetNetworkTxMb(), 0.002)
		require.Nil(t, u.CpuSeconds)
		require.Nil(t, u.MemoryMb)
	}
	t.Run("nothing sent, nothing measured", func(t *testing.T) {
		t.Parallel()
		u := attempt{config: object{"base_url": "http://203.0.113.1"}, policy: object{"allowed_domains": []string{"x.example"}}}.run(t.Context(), t, r).Usage
		require.NotNil(t, u.DurationSeconds)
		require.Nil(t, u.StatusCode)
		require.Nil(t, u.RequestBytes)
		require.Nil(t, u.ResponseBytes)
		require.Nil(t, u.NetworkRxMb)
	})
}

func TestSecurityContext(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	host, port := rec.hostPort(t)
	r := newRunner(t, Options{})
	a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"allowed_domains": []string{host}})}
	s := a.run(t.Context(), t, r).Security
	require.Len(t, s.GetPolicyDigest(), 64)
	require.Contains(t, s.GetIsolation(), "address_check")
	var checks []string
	for _, c := range s.GetChecks() {
		require.True(t, c.GetAllowed())
		checks = append(checks, c.GetRule()+" "+c.GetSubject())
	}
	require.Empty(t, cmp.Diff([]string{"max_request_size 2 bytes", "allowed_domains " + host, "allow_private_networks " + host + ":" + port, "max_response_size 2 bytes"}, checks))

	a.policy = object{"allowed_domains": []string{host}}
	s2 := a.run(t.Context(), t, r).Security
	require.NotEqual(t, s.GetPolicyDigest(), s2.GetPolicyDigest())
	last := s2.GetChecks()[len(s2.GetChecks())-1]
	require.False(t, last.GetAllowed())
	require.Equal(t, "allow_private_networks", last.GetRule())
	require.Contains(t, last.GetDetail(), "allow_private_networks: true")
}

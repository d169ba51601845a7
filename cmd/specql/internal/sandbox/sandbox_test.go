package sandbox

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image/png"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type answered struct {
	status int
	header http.Header
	body   []byte
}

func (a answered) json(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	require.NoError(t, json.Unmarshal(a.body, &v), string(a.body))
	return v
}

type caller struct {
	client *http.Client
	box    *Sandbox
}

func start(t *testing.T) caller {
	t.Helper()
	box, err := Start()
	require.NoError(t, err)
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		assert.NoError(t, box.Close())
	})
	return caller{client, box}
}

// call sends a request; headers come in pairs.
func (c caller) call(t *testing.T, variable, method, path, body string, headers ...string) answered {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, c.box.url(variable)+path, strings.NewReader(body))
	require.NoError(t, err)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := c.client.Do(req)
	require.NoError(t, err)
	defer func() { require.NoError(t, res.Body.Close()) }()
	raw, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Equal(t, "true", res.Header.Get("X-Specql-Sandbox"))
	return answered{res.StatusCode, res.Header, raw}
}

const (
	form      = "application/x-www-form-urlencoded"
	sigV4     = "AWS4-HMAC-SHA256 Credential=x/20261121/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=00"
	stripeURL = "SPECQL_EXAMPLES_STRIPE_URL"
)

func TestStripe(t *testing.T) {
	c := start(t)
	post := func(path, body, key string) answered {
		return c.call(t, stripeURL, "POST", path, body, "Content-Type", form, "Authorization", "Bearer sk", "Idempotency-Key", key)
	}
	charge := post("/v1/charges", "amount=1200&currency=USD&source=tok_visa&metadata[order]=7", "k1")
	require.Equal(t, 200, charge.status)
	require.Equal(t, false, charge.json(t)["livemode"])
	require.Equal(t, map[string]any{"order": "7"}, charge.json(t)["metadata"])
	again := post("/v1/charges", "amount=1200&currency=USD&source=tok_visa&metadata[order]=7", "k1")
	require.Equal(t, charge.body, again.body, "the same key is the same charge")
	require.Equal(t, 400, post("/v1/charges", "amount=1300&currency=usd", "k1").status, "a key belongs to its request")
	require.NotEqual(t, charge.json(t)["id"], post("/v1/charges", "amount=1200&currency=usd", "k2").json(t)["id"])

	id, _ := charge.json(t)["id"].(string)
	refund := post("/v1/refunds", "amount=200&charge="+url.QueryEscape(id), "k3")
	require.Equal(t, 200, refund.status)
	require.InDelta(t, 200, refund.json(t)["amount"], 0)
	require.Equal(t, 200, c.call(t, stripeURL, "GET", "/v1/charges/"+id, "", "Authorization", "Bearer sk").status)

	require.Equal(t, 402, post("/v1/charges", "amount=1&currency=usd&source=tok_chargeDeclined", "k4").status)
	require.Equal(t, 400, post("/v1/charges", "amount=-1&currency=usd", "k5").status)
	require.Equal(t, 400, post("/v1/charges", "amount=1", "k6").status)
	require.Equal(t, 400, post("/v1/refunds", "amount=99999&charge="+id, "k7").status)
	require.Equal(t, 404, post("/v1/refunds", "charge=none", "k8").status)
	require.Equal(t, 404, post("/v1/none", "", "k9").status)
	require.Equal(t, 401, c.call(t, stripeURL, "POST", "/v1/charges", "amount=1&currency=usd", "Content-Type", form).status)
}

func TestSendGrid(t *testing.T) {
	c := start(t)
	send := func(body string, headers ...string) answered {
		return c.call(t, "SPECQL_EXAMPLES_SENDGRID_URL", "POST", "/v3/mail/send", body, headers...)
	}
	mail := `{"personalizations":[{"to":[{"email":"a@example.com"}]}],"from":{"email":"b@example.com"},"subject":"s","content":[{"type":"text/plain","value":"v"}]}`
	ok := send(mail, "Authorization", "Bearer SG")
	require.Equal(t, 202, ok.status)
	require.Empty(t, ok.body)
	require.NotEmpty(t, ok.header.Get("X-Message-Id"))
	require.Equal(t, 401, send(mail).status)
	for _, body := range []string{"", "[", "{}", `{"personalizations":[1]}`, `{"personalizations":[1],"from":{"email":7}}`, `{"personalizations":[1],"from":{"email":"a@b"}}`} {
		require.Equal(t, 400, send(body, "Authorization", "Bearer SG").status, body)
	}
}

func TestS3(t *testing.T) {
	c := start(t)
	do := func(method, path, body string) answered {
		return c.call(t, "SPECQL_EXAMPLES_S3_URL", method, path, body, "Authorization", sigV4, "Content-Type", "text/plain")
	}
	require.Equal(t, 404, do("GET", "/bucket/a/b.txt", "").status)
	put := do("PUT", "/bucket/a/b.txt", "hello")
	require.Equal(t, 200, put.status)
	require.Equal(t, `"5d41402abc4b2a76b9719d911017c592"`, put.header.Get("Etag"))
	got := do("GET", "/bucket/a/b.txt", "")
	require.Equal(t, "hello", string(got.body))
	require.Equal(t, "text/plain", got.header.Get("Content-Type"))
	require.Equal(t, 200, do("HEAD", "/bucket/a/b.txt", "").status)
	require.Equal(t, 204, do("DELETE", "/bucket/a/b.txt", "").status)
	require.Equal(t, 404, do("GET", "/bucket/a/b.txt", "").status)
	require.Equal(t, 400, do("PUT", "/bucket/big", strings.Repeat("x", keptObject+1)).status)
	require.Equal(t, 400, do("GET", "/", "").status)
	require.Equal(t, 405, do("POST", "/bucket/x", "").status)
	require.Equal(t, 403, c.call(t, "SPECQL_EXAMPLES_S3_URL", "GET", "/bucket/x", "").status)
}

func TestLambda(t *testing.T) {
	c := start(t)
	invoke := func(body string, headers ...string) answered {
		return c.call(t, "SPECQL_EXAMPLES_LAMBDA_URL", "POST", "/2015-03-31/functions/resize/invocations", body, headers...)
	}
	ok := invoke(`{"width":32,"height":16}`, "Authorization", sigV4, "X-Amz-Log-Type", "Tail")
	require.Equal(t, 200, ok.status)
	require.Equal(t, "$LATEST", ok.header.Get("X-Amz-Executed-Version"))
	report, err := base64.StdEncoding.DecodeString(ok.header.Get("X-Amz-Log-Result"))
	require.NoError(t, err)
	require.Regexp(t, `REPORT RequestId: \S+\tDuration: [0-9.]+ ms\tBilled Duration: [1-9]\d* ms\tMemory Size: \d+ MB\tMax Memory Used: \d+ MB`, string(report))
	url, _ := ok.json(t)["resized_url"].(string)
	encoded := strings.TrimPrefix(url, "data:image/png;base64,")
	raw, err := base64.StdEncoding.DecodeString(encoded)
	require.NoError(t, err)
	img, err := png.Decode(bytes.NewReader(raw))
	require.NoError(t, err)
	require.Equal(t, 32, img.Bounds().Dx())
	require.Equal(t, 16, img.Bounds().Dy())
	again := invoke(`{"width":64,"height":64,"image_url":"`+url+`"}`, "Authorization", sigV4)
	require.Empty(t, again.header.Get("X-Amz-Function-Error"), string(again.body))

	for _, body := range []string{"", "[]", `{"width":0,"height":1}`, `{"width":99999,"height":1}`, `{"width":1,"height":1,"image_base64":"?"}`, `{"width":1,"height":1,"image_base64":"eHg="}`} {
		bad := invoke(body, "Authorization", sigV4)
		require.Equal(t, 200, bad.status)
		require.Equal(t, "Unhandled", bad.header.Get("X-Amz-Function-Error"), body)
		require.Contains(t, string(bad.body), "errorMessage")
	}
	require.Equal(t, 202, invoke(`{}`, "Authorization", sigV4, "X-Amz-Invocation-Type", "Event").status)
	require.Equal(t, 403, invoke(`{"width":1,"height":1}`).status)
}

func TestGoogle(t *testing.T) {
	c := start(t)
	const variable = "SPECQL_EXAMPLES_GCF_URL"
	require.Contains(t, c.box.ServiceAccount, c.box.url(variable)+"/token")
	claims := base64.RawURLEncoding.EncodeToString([]byte(`{"target_audience":"https://f"}`))
	token := c.call(t, variable, "POST", "/token", "assertion=x."+claims+".y", "Content-Type", form).json(t)["id_token"].(string)
	body, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	require.NoError(t, err)
	require.Contains(t, string(body), `"aud":"https://f"`)
	ok := c.call(t, variable, "POST", "/analyse", `{"values":[1,2,3,10]}`, "Authorization", "Bearer "+token)
	require.Equal(t, 200, ok.status)
	got := ok.json(t)
	require.InDelta(t, 4.0, got["count"], 0)
	require.InDelta(t, 4.0, got["mean"], 1e-9)
	require.InDelta(t, 2.5, got["median"], 1e-9)
	require.InDelta(t, 3.5355, got["stddev"], 1e-4)
	for _, body := range []string{"", "[", "{}", `{"values":[]}`, `{"values":["x"]}`} {
		require.Equal(t, 400, c.call(t, variable, "POST", "/", body, "Authorization", "Bearer x").status, body)
	}
	require.Equal(t, 403, c.call(t, variable, "POST", "/", `{"values":[1]}`).status)
	require.Equal(t, 400, c.call(t, variable, "POST", "/token", "", "Content-Type", form).status)
}

func TestAzure(t *testing.T) {
	c := start(t)
	const variable = "SPECQL_EXAMPLES_AZURE_URL"
	ok := c.call(t, variable, "POST", "/api/notify", `{"channel":"email","recipient":"a@example.com"}`, "X-Functions-Key", "k")
	require.Equal(t, 200, ok.status)
	require.Equal(t, "sent", ok.json(t)["status"])
	require.Equal(t, 401, c.call(t, variable, "POST", "/api/notify", `{}`).status)
	require.Equal(t, 400, c.call(t, variable, "POST", "/api/notify", `[`, "X-Functions-Key", "k").status)
}

func TestMemoryIsBounded(t *testing.T) {
	var m memory[int]
	for i := range remembered + 5 {
		m.put(string(rune(i)), i)
	}
	require.LessOrEqual(t, len(m.items), remembered)
	require.Len(t, m.order, len(m.items))
}

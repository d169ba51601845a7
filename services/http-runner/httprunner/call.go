package httprunner

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/net/http/httpguts"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	userAgent      = "specql-http-runner"
	maxURLBytes    = 64 << 10
	maxHeaderValue = 64 << 10
	mib            = 1 << 20
)

// call is one attempt.
type call struct {
	runner *Runner
	plan   *plan
	job    *runner.Job
	sink   runner.Sink
	checks *runner.Checks
	meter  *meter

	outcome outcome
	// sent: a request went out, or may have. closes: the target wants to be left alone by everybody for a time.
	sent, closes bool
	// token is the OAuth token in use, refused the one that the target did not take.
	token, refused string
	secrets        []string
	// pool is where connections come from; nil until the first.
	pool *connections

	status        int   // of the last answer, 0 for none
	requestBytes  int64 // of the last request's body
	responseBytes int64 // of the last answer's body, -1 where it was not read to its end
}

// message is a request in the making.
type message struct {
	method string
	url    *url.URL
	target target
	// header holds what the configuration and the body say; credentials and tracing are added
	// for each hop.
	header http.Header
	body   []byte
	// foreign says that a redirect has left the service's own origin.
	foreign bool
}

// run makes the call.
func (c *call) run(ctx context.Context) (json.RawMessage, *fault.Error) {
	telemetry.Enter(ctx, phaseRunner)
	in, err := readInput(c.job.Input)
	if err != nil {
		return nil, err
	}
	m, err := c.compose(in)
	if err != nil {
		return nil, err
	}
	renewed := false
	for hop := 0; ; {
		before := telemetry.Enter(ctx, phasePolicy)
		_, check := telemetry.Start(ctx, "policy check")
		err := c.plan.policy.check(c.checks, m.target, c.plan.base.target.host)
		check.End()
		telemetry.Enter(ctx, before)
		if err != nil {
			return nil, err
		}
		next, output, err := c.hop(ctx, m, &renewed)
		if err != nil || next == nil {
			return output, err
		}
		if next == m {
			continue
		}
		if hop++; hop > maxRedirects {
			return nil, fault.New(fault.RemoteError, "%s %s: more than %d redirects", m.method, withoutSecrets(m.url), maxRedirects)
		}
		m = next
	}
}

// asClient is the kind of a request's span.
var asClient = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient)}

// hop makes one request, in a span of its own, and gives the one that follows it, which is the
// same one where the target wants another token, or the output.
func (c *call) hop(ctx context.Context, m *message, renewed *bool) (next *message, output json.RawMessage, ferr *fault.Error) {
	ctx, span := telemetry.Start(ctx, "remote", asClient...)
	if span.IsRecording() {
		span.SetAttributes(attribute.String("http.request.method", m.method), attribute.String("server.address", m.target.host))
		defer func() {
			if c.status != 0 {
				span.SetAttributes(attribute.Int("http.response.status_code", c.status))
			}
			if ferr != nil {
				telemetry.Fail(span, ferr.Code)
			}
			span.End()
		}()
	}
	res, reused, ferr := c.exchange(ctx, m)
	if ferr != nil {
		return nil, nil, ferr
	}
	if res.StatusCode == http.StatusUnauthorized && reused && !*renewed {
		// The token was taken back before its time: one new one, then the verdict stands.
		discard(res)
		*renewed, c.refused = true, c.token
		return m, nil, nil
	}
	if next, ferr = c.redirect(m, res); ferr != nil || next != nil {
		discard(res)
		return next, nil, ferr
	}
	output, ferr = c.finish(ctx, m, res)
	return nil, output, ferr
}

// Values of headers that each request has. They are not written to.
var (
	userAgentHeader = []string{userAgent}
	acceptHeader    = []string{"application/json, */*"}
)

// compose makes the first request from the input.
func (c *call) compose(in *input) (*message, *fault.Error) {
	p := c.plan
	m := &message{method: p.method, target: p.base.target, header: http.Header{"User-Agent": userAgentHeader, "Accept": acceptHeader}}
	if p.url != nil {
		u := *p.url
		m.url = &u
	} else {
		path, err := p.path.fill(in, "path", pathEscaper(p.config.AuthType == authSigV4))
		if err != nil {
			return nil, err
		}
		if m.url, err = p.base.join(path); err != nil {
			return nil, err
		}
	}
	query := fields{}
	for _, q := range p.query {
		for _, t := range q.values {
			values, err := t.values(in, q.where)
			if err != nil {
				return nil, err
			}
			for _, v := range values {
				query = append(query, field{q.name, v})
			}
		}
	}
	for _, h := range p.headers {
		if err := setHeader(m.header, h, in); err != nil {
			return nil, err
		}
	}
	if p.restToQuery && len(in.fields) > 0 {
		rest, err := formFields(in.rest(), true, p.policy.maxRequest)
		if err != nil {
			return nil, err
		}
		query = append(query, rest...)
	}
	m.url.RawQuery = query.encode()
	kind := p.body
	if p.noEmptyBody && len(in.rest()) == 0 {
		kind = bodyNone
	}
	body, contentType, err := in.encodeBody(kind, p.policy.maxRequest)
	if err != nil {
		return nil, err
	}
	m.body = body
	if contentType != "" && m.header.Get("Content-Type") == "" {
		m.header.Set("Content-Type", contentType)
	}
	return m, c.checkSize(m)
}

// checkSize holds a request against max_request_size before anything is sent.
func (c *call) checkSize(m *message) *fault.Error {
	most := c.plan.policy.maxRequest
	if size := int64(len(m.body) + len(m.url.RawQuery)); size > most {
		return c.checks.Deny("max_request_size", strconv.FormatInt(size, 10)+" bytes",
			fmt.Sprintf("at most %d bytes of body and query string may be sent; raise max_request_size (%d at most) or send less", most, maxRequestBytes), c.plan.policy.allowingSize("max_request_size", size, maxRequestBytes)...)
	} else if size > 0 {
		c.checks.Allow("max_request_size", strconv.FormatInt(size, 10)+" bytes")
	}
	if size := len(m.url.RequestURI()); size > maxURLBytes {
		return fault.New(fault.Validation, "the URL is %d bytes long; at most %d are sent. Set body: json to send the input as the body", size, maxURLBytes)
	}
	return nil
}

// join adds a filled path to the base URL.
func (b base) join(path string) (*url.URL, *fault.Error) {
	if dotSegments(path) {
		return nil, fault.New(fault.Validation, "path: the input makes a . or .. segment of it")
	}
	u := *b.url
	raw := strings.TrimSuffix(u.EscapedPath(), "/") + escapeLiteral(path)
	if strings.HasPrefix(raw, "//") { // some servers and caches take what follows for a host
		return nil, fault.New(fault.Validation, "path: begins with two slashes, which is read as a host by some")
	}
	if raw == "" {
		raw = "/"
	}
	plain, err := url.PathUnescape(raw)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "path: the escaped path is not valid")
	}
	u.Path, u.RawPath = plain, raw
	if u.EscapedPath() != raw { // then net/url would send another path than was meant
		return nil, fault.New(fault.Validation, "path: holds characters that a URL's path cannot hold")
	}
	return &u, nil
}

// escapeLiteral escapes what may not stand in a path and is no escape already.
func escapeLiteral(path string) string {
	if !strings.ContainsFunc(path, literalNeedsEscape) {
		return path
	}
	var b strings.Builder
	for i := range len(path) {
		if c := path[i]; c >= 0x80 || literalNeedsEscape(rune(c)) {
			b.WriteString("%" + strings.ToUpper(strconv.FormatUint(uint64(c)|0x100, 16)[1:]))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func literalNeedsEscape(c rune) bool {
	return c <= ' ' || c >= 0x7f || strings.ContainsRune("\"#<>?\\^`{|}", c)
}

func setHeader(header http.Header, h param, in *input) *fault.Error {
	header.Del(h.name)
	for _, t := range h.values {
		values, err := t.values(in, h.where)
		if err != nil {
			return err
		}
		for _, v := range values {
			switch {
			case !httpguts.ValidHeaderFieldValue(v):
				return fault.New(fault.Validation, "%s: the input gives a value with a line break or a control character, which a header cannot hold", h.where)
			case len(v) > maxHeaderValue:
				return fault.New(fault.Validation, "%s: the value is %d bytes long; at most %d are sent", h.where, len(v), maxHeaderValue)
			}
			header.Add(h.name, v)
		}
	}
	return nil
}

// exchange sends a request and waits for the head of the answer.
func (c *call) exchange(ctx context.Context, m *message) (res *http.Response, reused bool, ferr *fault.Error) {
	u := *m.url // the signer changes it
	req := &http.Request{
		Method: m.method, URL: &u, Host: m.url.Host, Header: m.header.Clone(),
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: int64(len(m.body)),
	}
	if len(m.body) > 0 {
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m.body)), nil }
		req.Body = io.NopCloser(bytes.NewReader(m.body))
	}
	if !m.foreign {
		if reused, ferr = c.authorize(ctx, req, m.body); ferr != nil {
			return nil, false, ferr
		}
		propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(req.Header))
	}
	c.setIdempotencyKey(req)
	pool, ferr := c.transport()
	if ferr != nil {
		return nil, false, ferr
	}
	c.meter.begin()
	c.requestBytes = int64(len(m.body))
	start := time.Now()
	c.sent = true
	res, err := pool.send(ctx, req, c.meter)
	telemetry.Enter(ctx, phaseRunner)
	c.noteConnections()
	if err != nil {
		ferr := c.classify(ctx, err, m.method, m.url)
		if ferr.Code == fault.Unavailable || ferr.Code == fault.Timeout {
			c.outcome = failing
		}
		return nil, false, ferr
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		_ = res.Body.Close() // it is the connection itself, and has no end
		return nil, false, fault.New(fault.RemoteError, "%s %s answered 101 and speaks another protocol now, which was not asked for", m.method, withoutSecrets(m.url))
	}
	if res.TLS != nil {
		c.checks.Allow("tls", m.target.host+" by "+tls.VersionName(res.TLS.Version))
	}
	c.status, c.responseBytes = res.StatusCode, -1
	c.outcome = healthy
	if res.StatusCode >= 500 {
		c.outcome = failing
	}
	c.sink.Log("runner", m.method+" "+withoutSecrets(m.url)+": "+strconv.Itoa(res.StatusCode)+" in "+strconv.FormatInt(time.Since(start).Milliseconds(), 10)+" ms")
	return res, reused, nil
}

// transport gives the pool of the call: that of the service's own CAs where it names them.
func (c *call) transport() (*connections, *fault.Error) {
	if c.pool != nil {
		return c.pool, nil
	}
	allowPrivate, name := c.plan.policy.allowPrivate, c.plan.config.CAEnvVar
	if name == "" {
		c.pool = c.runner.transport(allowPrivate)
		return c.pool, nil
	}
	if err := c.plan.policy.checkEnvVar(c.checks, name); err != nil {
		return nil, err
	}
	pem, err := runner.ResolveSecret(nil, name) // certificates are no secret: masked, they would hide their lines everywhere
	if err != nil {
		return nil, fault.From(err)
	}
	if c.pool = c.runner.own.of(allowPrivate, pem, &c.runner.options); c.pool == nil {
		return nil, fault.New(fault.Validation, "the environment variable %s of ca_env_var holds no certificate; put the CA's certificate into it, in PEM form", name)
	}
	return c.pool, nil
}

var idempotencyHeader = strings.ToLower("Idempotency-Key")

// setIdempotencyKey sets the header of the job's key, unless the configuration has one.
//
// It is written in lower case, which is the same header to every server, since net/http takes
// the usual spelling for leave to send a request again by itself when a connection breaks.
// Repeating is the orchestrator's to decide.
func (c *call) setIdempotencyKey(req *http.Request) {
	for _, name := range []string{"Idempotency-Key", "X-Idempotency-Key"} {
		if values, ok := req.Header[name]; ok {
			delete(req.Header, name)
			req.Header[strings.ToLower(name)] = values
		}
	}
	name := idempotencyHeader
	if _, ok := req.Header[name]; !ok && c.job.IdempotencyKey != "" && httpguts.ValidHeaderFieldValue(c.job.IdempotencyKey) {
		req.Header[name] = []string{c.job.IdempotencyKey}
	}
}

// noteConnections notes the addresses that passed the check when they were connected to.
func (c *call) noteConnections() {
	for _, a := range c.meter.connections() {
		c.checks.Allow("allow_private_networks", a)
	}
}

// redirect gives the request that an answer asks for, nil where it asks for none.
func (c *call) redirect(m *message, res *http.Response) (*message, *fault.Error) {
	switch res.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, nil
	}
	location := res.Header.Get("Location")
	if location == "" || c.plan.success != nil && c.plan.succeeded(res.StatusCode) {
		return nil, nil
	}
	from := m.method + " " + withoutSecrets(m.url)
	u, err := m.url.Parse(location)
	if err != nil {
		return nil, fault.New(fault.RemoteError, "%s redirects to something that is not a URL", from)
	}
	u.Fragment, u.RawFragment = "", ""
	if s := strings.ToLower(u.Scheme); s != "http" && s != "https" {
		return nil, c.checks.Deny("allowed_domains", clip(u.Scheme+":"), from+" redirects to a URL that is neither http nor https")
	}
	if u.User != nil {
		return nil, fault.New(fault.RemoteError, "%s redirects to a URL with a user name, which is not followed", from)
	}
	t, ferr := targetOf(u)
	if ferr != nil {
		return nil, fault.New(fault.RemoteError, "%s redirects to a URL that cannot be called: %s", from, ferr.Message)
	}
	if m.target.scheme == "https" && t.scheme == "http" {
		_ = c.checks.Deny("tls", t.origin(), from+" redirects from https to http") // the target's fault, not the service's
		return nil, fault.New(fault.RemoteError, "%s redirects from https to http at %s, which is not followed", from, t.host)
	}
	next := &message{method: m.method, url: u, target: t, header: m.header.Clone(), body: m.body, foreign: m.foreign || t.origin() != m.target.origin()}
	keepsMethod := res.StatusCode == http.StatusTemporaryRedirect || res.StatusCode == http.StatusPermanentRedirect
	if !keepsMethod && m.method != http.MethodHead && m.method != http.MethodGet {
		next.method, next.body = http.MethodGet, nil
	}
	if len(next.body) == 0 {
		next.header.Del("Content-Type")
		next.header.Del("Content-Encoding")
	}
	if next.foreign {
		// A configured header may be a credential: none of them leaves the service's origin.
		kept := http.Header{}
		for _, name := range []string{"Accept", "Content-Type", "User-Agent"} {
			if v := next.header.Values(name); len(v) > 0 {
				kept[name] = v
			}
		}
		next.header = kept
	}
	return next, nil
}

// discard reads the little that is left of an answer, so that its connection can be used again.
func discard(res *http.Response) {
	_, _ = io.CopyN(io.Discard, res.Body, maxErrorBody)
	_ = res.Body.Close()
}

// finish reads the last answer and makes the output or the error of it.
func (c *call) finish(ctx context.Context, m *message, res *http.Response) (json.RawMessage, *fault.Error) {
	defer func() { _ = res.Body.Close() }()
	most := c.plan.policy.maxResponse
	if !c.plan.succeeded(res.StatusCode) {
		body, err := io.ReadAll(io.LimitReader(res.Body, min(most, maxErrorBody)+1))
		if err == nil && int64(len(body)) <= min(most, maxErrorBody) {
			c.responseBytes = int64(len(body))
		}
		return nil, c.refuse(res, m.method, m.url, body)
	}
	if res.ContentLength > most && m.method != http.MethodHead {
		return nil, c.tooLarge(m, fmt.Sprintf("%d bytes", res.ContentLength), res.ContentLength)
	}
	var body []byte
	var err error
	if res.Body != http.NoBody {
		telemetry.Enter(ctx, phaseBody)
		body, err = readAll(io.LimitReader(res.Body, most+1), res.ContentLength)
		telemetry.Enter(ctx, phaseRunner)
	}
	if err != nil {
		ferr := c.classify(ctx, err, m.method, m.url)
		if ferr.Code == fault.Unavailable || ferr.Code == fault.Timeout {
			c.outcome = failing
		}
		return nil, ferr
	}
	if int64(len(body)) > most {
		return nil, c.tooLarge(m, fmt.Sprintf("more than %d bytes", most), 0)
	}
	c.responseBytes = int64(len(body))
	c.checks.Allow("max_response_size", strconv.Itoa(len(body))+" bytes")
	return outputOf(res, body)
}

// readAll reads a body whose length may be known.
func readAll(r io.Reader, length int64) ([]byte, error) {
	var b bytes.Buffer
	if length > 0 && length < mib {
		b.Grow(int(length) + bytes.MinRead)
	}
	_, err := b.ReadFrom(r)
	return b.Bytes(), err // classified by the caller
}

// tooLarge refuses an answer. length is 0 where nobody knows it.
func (c *call) tooLarge(m *message, size string, length int64) *fault.Error {
	most := c.plan.policy.maxResponse
	mend := "raise max_response_size"
	if most >= maxResponseBytes {
		mend = "no policy allows more; ask for less at a time, or for a reference to the data"
	}
	// The verdict belongs into the security context; the error is one of resources.
	_ = c.checks.Deny("max_response_size", size, fmt.Sprintf("at most %d bytes are read; %s", most, mend),
		c.plan.policy.allowingSize("max_response_size", length, maxResponseBytes)...)
	return fault.New(fault.ResourceExceeded, "%s %s: the answer has %s; max_response_size is %d; %s", m.method, withoutSecrets(m.url), size, most, mend)
}

// usage gives what was measured.
func (c *call) usage() *runnerv1.ResourceUsage {
	all := &struct { // in one piece, since each call has them
		usage                              runnerv1.ResourceUsage
		status                             int32
		request, response, received, wrote float64
	}{}
	u := &all.usage
	u.Source = "http"
	if c.status != 0 {
		all.status = int32(c.status) //nolint:gosec // three digits
		u.StatusCode = &all.status
		if c.responseBytes >= 0 {
			all.response = float64(c.responseBytes)
			u.ResponseBytes = &all.response
		}
	}
	measured, wrote := c.meter.snapshot()
	if wrote {
		all.request = float64(c.requestBytes)
		u.RequestBytes = &all.request
	}
	if measured {
		all.received, all.wrote = float64(c.meter.wire.received.Load())/mib, float64(c.meter.wire.sent.Load())/mib
		u.NetworkRxMb, u.NetworkTxMb = &all.received, &all.wrote
	}
	return u
}

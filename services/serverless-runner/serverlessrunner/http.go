package serverlessrunner

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/specql/mesh/pkg/fault"
)

// post calls an HTTP function once and reads its answer. header is sent beside what every
// call carries; refused says what a 401 or 403 most likely means.
func (r *Runner) post(ctx context.Context, c *call, header http.Header, refused string) (json.RawMessage, error) {
	host := c.target.url.Host
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.target.url.String(), bytes.NewReader(c.job.Input))
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the function's URL is not valid: %v", err)
	}
	if header != nil {
		req.Header = header
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, */*;q=0.5")
	req.Header.Set("User-Agent", "specql-serverless-runner")
	for name, value := range map[string]string{
		"Idempotency-Key": c.job.IdempotencyKey, "X-Specql-Operation": c.job.Operation.Name,
		"X-Correlation-Id": c.job.CorrelationID, "Traceparent": c.traceparent,
	} {
		if value == "" {
			continue
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
			return nil, fault.New(fault.Validation, "the value of the header %s has characters that no header may have", name)
		}
		req.Header.Set(name, value)
	}
	c.invoked = true
	resp, err := r.client(c).Do(req)
	if err != nil {
		return nil, c.connectionFault(err, host)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, c.connectionFault(err, host)
	}
	c.usage.StatusCode = new(int32(resp.StatusCode)) //nolint:gosec // three digits
	c.usage.ResponseBytes = new(float64(len(body)))
	if id := resp.Header.Get("Function-Execution-Id"); id != "" {
		c.sink.Log("runner", "execution id "+clip(id, 100))
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, statusFault(resp, body, refused)
	}
	if len(bytes.TrimSpace(body)) > 0 && json.Valid(body) {
		return body, nil
	}
	return marshal(map[string]any{"body": strings.ToValidUTF8(string(body), "\uFFFD"), "status_code": resp.StatusCode, "headers": plainHeaders(resp.Header)})
}

// connectionFault keeps an address that was refused for the policy check.
func (c *call) connectionFault(err error, host string) error {
	if isRefused(err) {
		return err
	}
	return connectionFault(err, host)
}

// statusFault turns an answer that is no success into a fault.
func statusFault(resp *http.Response, body []byte, refused string) error {
	text := clip(strings.TrimSpace(string(body)), 2<<10)
	if text != "" {
		text = ": " + text
	}
	f := fault.New(fault.RemoteError, "the function answered %s%s", statusText(resp.StatusCode), text)
	switch code := resp.StatusCode; {
	case code >= 300 && code <= 399:
		f.Message = fmt.Sprintf("the function answered %s to %q; redirects are not followed, write endpoint: with the function's own URL", statusText(code), clip(resp.Header.Get("Location"), 200))
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		f.Message += "; " + refused
	case code == http.StatusTooManyRequests:
		f.Code, f.Retryable = fault.RateLimited, true
		f.RetryAfter = retryAfter(resp.Header.Get("Retry-After"))
	case code == http.StatusRequestTimeout, code == http.StatusGatewayTimeout:
		f.Code, f.Retryable = fault.Timeout, true
	case code == http.StatusServiceUnavailable:
		f.Code, f.Retryable = fault.Unavailable, true
		f.RetryAfter = retryAfter(resp.Header.Get("Retry-After"))
	case code == http.StatusInternalServerError, code == http.StatusBadGateway:
		f.Retryable = true
	}
	return f
}

func statusText(code int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", code, http.StatusText(code)))
}

// maxRetryAfter bounds how long an answer may ask to be left alone.
const maxRetryAfter = time.Hour

// retryAfter reads a Retry-After header: seconds or a date; zero where it says nothing.
func retryAfter(value string) time.Duration {
	if value == "" {
		return 0
	}
	if s, err := strconv.ParseFloat(value, 64); err == nil {
		if !(s > 0) { // not NaN either
			return 0
		}
		return min(seconds(s), maxRetryAfter)
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(time.Until(at), 0), maxRetryAfter)
}

func plainHeaders(h http.Header) map[string]string {
	plain := make(map[string]string, len(h))
	for name := range h {
		if name != "Set-Cookie" {
			plain[strings.ToLower(name)] = h.Get(name)
		}
	}
	return plain
}

package httprunner

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/specql/mesh/pkg/fault"
)

const (
	// maxExcerpt is how much of an error's body its message holds, in bytes.
	maxExcerpt = 2 << 10
	// maxErrorBody is how much of an error's body is read, so that its connection can be kept.
	maxErrorBody = 64 << 10
	// maxRetryAfter bounds what a target may ask for.
	maxRetryAfter = time.Hour
)

// classify says what a failed exchange means.
func (c *call) classify(ctx context.Context, err error, method string, u *url.URL) *fault.Error {
	if pastDeadline(ctx, err) {
		<-ctx.Done() // it tells why
	}
	if ctx.Err() != nil {
		return fault.From(context.Cause(ctx))
	}
	what := method + " " + withoutSecrets(u)
	if address, ok := errors.AsType[*addressError](err); ok {
		return c.refuseAddress(address, u.Hostname()+" at "+address.address)
	}
	remote := func(text string) *fault.Error {
		return fault.Wrap(err, fault.RemoteError, "%s: %s", what, text)
	}
	var (
		verification *tls.CertificateVerificationError
		authority    x509.UnknownAuthorityError
		hostname     x509.HostnameError
		invalid      x509.CertificateInvalidError
		record       tls.RecordHeaderError
		alert        tls.AlertError
		dns          *net.DNSError
		netErr       net.Error
		corrupt      flate.CorruptInputError
	)
	switch {
	case errors.As(err, &verification), errors.As(err, &authority), errors.As(err, &hostname), errors.As(err, &invalid):
		_ = c.checks.Deny("tls", u.Host, "the certificate is not trusted: "+excerpt([]byte(innermost(err)))) // the error stays the target's
		return remote("the certificate is not trusted: " + excerpt([]byte(innermost(err))))
	case errors.As(err, &record):
		return remote("the target does not speak TLS here; is the port right, or is it an http URL?")
	case errors.As(err, &alert):
		return remote("the TLS handshake failed: " + excerpt([]byte(alert.Error())))
	case strings.HasPrefix(innermost(err), "tls: "): // a version, a cipher or a message of the handshake; they have no types
		return remote("the TLS handshake failed: " + excerpt([]byte(innermost(err))))
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.As(err, &corrupt):
		return remote("the compressed body is damaged")
	case errors.As(err, &dns):
		return fault.Wrap(err, fault.Unavailable, "%s: the name %s could not be resolved: %s", what, clip(dns.Name), dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fault.Wrap(err, fault.Unavailable, "%s: the connection was refused", what)
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fault.Wrap(err, fault.Unavailable, "%s: the connection was closed before the whole answer had come", what)
	case errors.As(err, &netErr) && netErr.Timeout():
		return fault.Wrap(err, fault.Unavailable, "%s: the connection could not be opened in %s", what, dialTimeout)
	case malformed(err):
		return remote("the answer is not valid HTTP: " + excerpt([]byte(innermost(err))))
	}
	return fault.Wrap(err, fault.Unavailable, "%s: %s", what, excerpt([]byte(innermost(err))))
}

// pastDeadline says whether an exchange ended with the deadline of its call: a dial looks at the clock itself, and may
// see it before the timer of the context has fired.
func pastDeadline(ctx context.Context, err error) bool {
	deadline, limited := ctx.Deadline()
	netErr, ok := errors.AsType[net.Error](err)
	return limited && ok && netErr.Timeout() && !time.Now().Before(deadline)
}

// refuseAddress notes an address that the policy forbids.
func (c *call) refuseAddress(address *addressError, subject string) *fault.Error {
	switch {
	case address.never:
		return c.checks.Deny("allow_private_networks", subject, address.Error()+", which no policy allows")
	case address.byName:
		return c.checks.Deny("allow_private_networks", subject, address.Error()+", to which no name may lead; where it is meant, write the address itself into the URL and into allowed_domains")
	}
	return c.checks.Deny("allow_private_networks", subject, fmt.Sprintf(
		"%s; if the service is meant to be reached there, set allow_private_networks: true in %s", address.Error(), c.plan.policy.privateBy), c.plan.policy.allowingPrivate()...)
}

// malformed recognises the errors of net/http for answers that break the protocol; they have
// no types.
func malformed(err error) bool {
	text := err.Error()
	return slices.ContainsFunc([]string{
		"malformed HTTP", "multiple Content-Length", "malformed MIME", "server response headers exceeded", "unsupported transfer encoding", "bad Content-Length",
		"http2: server sent GOAWAY", "too many transfer encodings", "invalid header", "malformed chunked", "invalid byte in chunk length",
		"too many 1xx", "suspiciously long trailer", "chunked encoding", "chunked line", "header list too long", "header line too long", "invalid URL host", "unexpected trailer",
	}, func(s string) bool { return strings.Contains(text, s) })
}

// innermost is the text of the error at the bottom of a chain, without the URLs that the outer
// ones repeat.
func innermost(err error) string {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err.Error()
		}
		err = next
	}
}

// excerpt is [excerpt] of a text that may hold the call's secrets. The kit masks what leaves the
// runner, but could not recognise a secret that was cut in two.
func (c *call) excerpt(body []byte) string {
	// The longest first: a secret may begin with another one.
	slices.SortFunc(c.secrets, func(a, b string) int { return len(b) - len(a) })
	for _, s := range c.secrets {
		body = bytes.ReplaceAll(body, []byte(s), []byte("***"))
	}
	return excerpt(body)
}

// excerpt makes foreign text fit for a message: short, valid, without control characters.
func excerpt(body []byte) string {
	cut := len(body) > maxExcerpt
	if cut {
		body = body[:maxExcerpt]
	}
	text := strings.Map(func(c rune) rune {
		switch {
		case c == '\n', c == '\r', c == '\t':
			return ' '
		case c < ' ', c == 0x7f, c >= 0x80 && c < 0xa0, c >= 0x202a && c <= 0x202e, c >= 0x2066 && c <= 0x2069: // controls, and what turns the direction of text
			return -1
		}
		return c
	}, string(bytes.ToValidUTF8(body, nil)))
	text = strings.TrimSpace(text)
	if cut {
		text += "…"
	}
	return text
}

// refuse makes the error of an answer that is no success.
func (c *call) refuse(res *http.Response, method string, u *url.URL, body []byte) *fault.Error {
	said := ""
	if text := c.excerpt(body); text != "" {
		said = ": " + text
	}
	code := fault.RemoteError
	if res.StatusCode == http.StatusTooManyRequests {
		code = fault.RateLimited
	}
	name := http.StatusText(res.StatusCode)
	if name != "" {
		name = " " + name
	}
	err := fault.New(code, "%s %s answered %d%s%s", method, withoutSecrets(u), res.StatusCode, name, said)
	err.Retryable = slices.Contains(c.plan.retry, res.StatusCode)
	if err.Retryable {
		err.RetryAfter = retryAfter(res.Header, c.runner.now())
	}
	c.closes = err.RetryAfter > 0 && (res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusServiceUnavailable)
	return err
}

// retryAfter reads Retry-After, in seconds or as a date; zero where there is none.
func retryAfter(h http.Header, now time.Time) time.Duration {
	value := strings.TrimSpace(h.Get("Retry-After"))
	if value == "" {
		return 0
	}
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		// Bounded before it is multiplied: a large one of either sign would turn into another.
		return time.Duration(min(max(0, seconds), int64(maxRetryAfter/time.Second))) * time.Second
	} else if errors.Is(err, strconv.ErrRange) && seconds > 0 {
		return maxRetryAfter
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(0, at.Sub(now)), maxRetryAfter)
}

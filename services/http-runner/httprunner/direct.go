package httprunner

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/specql/mesh/pkg/linger"
)

// maxDirectBody is the largest body, in bytes, that is written before the answer is looked for. A target that answers a
// larger one before it has read it would not be heard.
const maxDirectBody = 16 << 10

// unwatched is how long an exchange may take before somebody sees to it that it ends with its call.
const unwatched = 10 * time.Millisecond

// maxInformational is how many answers 1xx may come before the answer.
const maxInformational = 5

// direct sends requests without TLS on connections that it keeps, on the goroutine of the call: net/http's Transport has
// two goroutines for each connection, which wake one another and the call several times a request. It opens connections
// as the Transport does, writes requests and reads answers with net/http, and repeats a request where the Transport would.
type direct struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	slow *linger.Queue[*directBody]

	mu sync.Mutex
	// idle connections by address; the one that was used last is last.
	idle  map[string][]*directConn
	count int
	sweep *time.Timer // runs while there are any
}

// directConn is a connection of [direct].
type directConn struct {
	net.Conn

	counted *countedConn // the same one
	address string
	raw     syscall.RawConn // what lies below; nil where that is not known, so that it is not kept
	in      *bufio.Reader
	since   time.Time // idle since

	// What follows is of the request that it carries. reused: it is not the first one.
	reused bool
	buffer bytes.Buffer
	// unsent is what is left of the request. It is sent when the answer is first looked for.
	unsent []byte
	meter  *meter
	stages *stages
	// left is how much may still be read.
	left, sent, received int64
	asking               asking
}

// suits says whether a request may go this way: a small one whose headers ask for nothing that only the Transport does.
func (*direct) suits(req *http.Request) bool {
	if req.URL.Scheme != "http" || req.ContentLength > maxDirectBody {
		return false
	}
	for _, name := range [...]string{"Connection", "Expect", "Te", "Trailer", "Transfer-Encoding", "Upgrade"} {
		if _, ok := req.Header[name]; ok {
			return false
		}
	}
	// A target that answers early to what it does not want to read is heard by the Transport alone.
	size := 0
	for name, values := range req.Header {
		for _, value := range values {
			size += len(name) + len(value)
		}
	}
	return size <= maxDirectBody
}

// errInformational is net/http's, which has no type.
var errInformational = errors.New("net/http: too many 1xx informational responses")

// acceptGzip is not written to.
var acceptGzip = []string{"gzip"}

// roundTrip sends a request and gives the answer with its body still to be read. The request's headers are its own.
func (d *direct) roundTrip(ctx context.Context, req *http.Request, m *meter) (*http.Response, error) {
	address := req.URL.Host
	if req.URL.Port() == "" {
		address = net.JoinHostPort(req.URL.Hostname(), "80")
	}
	unzip := false
	if req.Method != http.MethodHead && len(req.Header["Accept-Encoding"]) == 0 && len(req.Header["Range"]) == 0 {
		unzip = true
		req.Header["Accept-Encoding"] = acceptGzip
	}
	stages := stagesOf(ctx)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err // an open connection would be quicker than what watches the context
		}
		stages.connecting(phaseConnect)
		c := d.take(address)
		if c == nil {
			var err error
			if c, err = d.open(ctx, address, m); err != nil {
				return nil, err
			}
		}
		stages.got()
		m.connectedBy(c.Conn)
		res, again, err := d.exchange(ctx, c, req, m, stages)
		if err == nil {
			if unzip && res.Body != http.NoBody && strings.EqualFold(res.Header.Get("Content-Encoding"), "gzip") {
				res.Body = &unzipped{body: res.Body}
				res.Header.Del("Content-Encoding")
				res.Header.Del("Content-Length")
				res.ContentLength, res.Uncompressed = -1, true
			}
			return res, nil
		}
		if !c.reused || !again {
			return nil, err
		}
		if req.GetBody != nil {
			if req.Body, err = req.GetBody(); err != nil {
				return nil, err
			}
		}
	}
}

// exchange sends a request on a connection. again says that on a connection that was idle, where the target may have
// closed it at this moment, the request may be sent on another one.
func (d *direct) exchange(ctx context.Context, c *directConn, req *http.Request, m *meter, stages *stages) (res *http.Response, again bool, err error) {
	body := &directBody{d: d, c: c, ctx: ctx}
	d.slow.Add(time.Now(), body)
	defer func() {
		if err != nil {
			body.end(false)
		}
	}()
	c.sent, c.received, c.left = 0, 0, maxHeaderBytes
	c.meter, c.stages = m, stages
	c.buffer.Reset()
	if err := req.Write(&c.buffer); err != nil {
		return nil, false, fmt.Errorf("write the request: %w", err)
	}
	c.unsent = c.buffer.Bytes()
	if _, err := c.in.Peek(1); err != nil {
		return nil, c.sent == 0 || c.received == 0 && repeatable(req.Method), fmt.Errorf("send the request and read the answer: %w", err)
	}
	stages.enter(phaseRunner)
	for n := 0; ; n++ {
		if res, err = http.ReadResponse(c.in, req); err != nil {
			return nil, false, fmt.Errorf("read the answer: %w", err)
		}
		if res.StatusCode/100 != 1 || res.StatusCode == http.StatusSwitchingProtocols {
			break
		}
		if n == maxInformational {
			return nil, false, errInformational
		}
	}
	c.left = math.MaxInt64
	body.ReadCloser, body.keep = res.Body, !res.Close && res.StatusCode >= 200
	if req.Method == http.MethodHead || res.ContentLength == 0 || res.StatusCode == http.StatusSwitchingProtocols {
		body.end(true)
		res.Body = http.NoBody
		return res, false, nil
	}
	res.Body = body
	return res, false, nil
}

// repeatable says whether a request of the method does nothing, so that it may be sent twice.
func repeatable(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return false
}

// open makes a connection.
func (d *direct) open(ctx context.Context, address string, m *meter) (*directConn, error) {
	conn, err := d.dial(m.trace(ctx), "tcp", address)
	if err != nil {
		return nil, err // classified by the caller
	}
	c := &directConn{Conn: conn, address: address}
	c.in = bufio.NewReader(c)
	if counted, ok := conn.(*countedConn); ok {
		c.counted = counted
		if s, ok := counted.Conn.(syscall.Conn); ok {
			if c.raw, err = s.SyscallConn(); err != nil {
				c.raw = nil
			}
		}
	}
	c.asking.step = c.step
	return c, nil
}

func (c *directConn) Read(p []byte) (n int, err error) {
	if c.left <= 0 {
		return 0, fmt.Errorf("net/http: server response headers exceeded %d bytes; aborted", maxHeaderBytes)
	}
	if int64(len(p)) > c.left {
		p = p[:c.left]
	}
	if len(c.unsent) > 0 && c.raw != nil {
		n, err = c.ask(p)
	}
	if len(c.unsent) > 0 && err == nil { // the connection did not take all of it at once
		err = c.send()
	}
	if n == 0 && err == nil {
		n, err = c.Conn.Read(p)
	}
	c.left -= int64(n)
	c.received += int64(n)
	return n, err // net/http compares these
}

// send sends what is left of the request.
func (c *directConn) send() error {
	n, err := c.Write(c.unsent)
	c.wrote(n)
	return err // classified by the caller
}

// wrote says how much of the request was sent.
func (c *directConn) wrote(n int) {
	c.sent += int64(n)
	if c.unsent = c.unsent[n:]; len(c.unsent) == 0 {
		c.meter.wroteRequest()
		c.stages.enter(phaseFirstByte)
	}
}

// abort ends whatever the connection does.
func (c *directConn) abort() { _ = c.SetDeadline(time.Unix(1, 0)) }

// directBody is an exchange, and the body of its answer.
type directBody struct {
	io.ReadCloser // its length is that of the answer

	d    *direct
	c    *directConn
	ctx  context.Context //nolint:containedctx // of this one exchange
	keep bool

	mu   sync.Mutex
	over bool
	// unwatch ends what ends the exchange with its context; nil where it was over before that was needed.
	unwatch func() bool
}

// watch ends the exchange with its context. Most are over before.
func (b *directBody) watch() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.over {
		b.unwatch = context.AfterFunc(b.ctx, b.c.abort)
	}
}

// finish says that the exchange is over, and whether its context left it alone. It is called once.
func (b *directBody) finish() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	if b.unwatch == nil {
		return b.ctx.Err() == nil
	}
	return b.unwatch()
}

func (b *directBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.end(err == io.EOF) //nolint:errorlint // Read gives it as it is
	}
	return n, err // the end is no error to be wrapped
}

// Close closes the connection where the answer was not read to its end: what is left of it would be taken for the next one.
func (b *directBody) Close() error {
	b.end(false)
	return nil
}

func (b *directBody) end(whole bool) {
	if b.c == nil {
		return
	}
	c, alone := b.c, b.finish()
	b.c = nil // watch sees that it is over
	if !alone || !whole || !b.keep || c.raw == nil || c.in.Buffered() > 0 {
		_ = c.Close()
		return
	}
	b.d.put(c)
}

// unzipped is a body that is compressed on its way.
type unzipped struct {
	body io.ReadCloser
	zip  *gzip.Reader
}

func (u *unzipped) Read(p []byte) (n int, err error) {
	if u.zip == nil {
		if u.zip, err = gzip.NewReader(u.body); err != nil {
			u.zip = nil
			return 0, err // classified by the caller
		}
	}
	return u.zip.Read(p)
}

func (u *unzipped) Close() error { return u.body.Close() }

// take gives an idle connection, nil where there is none.
func (d *direct) take(address string) *directConn {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := d.idle[address]
	if len(list) == 0 {
		return nil
	}
	c := list[len(list)-1]
	list[len(list)-1] = nil
	if d.idle[address] = list[:len(list)-1]; len(list) == 1 {
		delete(d.idle, address)
	}
	d.count--
	return c
}

// mostBuffered is how much room for requests a connection keeps, in bytes.
const mostBuffered = 4 << 10

// put keeps a connection for the next request.
func (d *direct) put(c *directConn) {
	c.reused, c.meter, c.stages = true, nil, nil
	if c.buffer.Cap() > mostBuffered {
		c.buffer = bytes.Buffer{}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c.since = time.Now()
	if len(d.idle[c.address]) >= maxIdlePerHost {
		_ = c.Close()
		return
	}
	if d.count >= maxIdleConns {
		for address := range d.idle {
			d.drop(address, 1)
			break
		}
	}
	if d.idle == nil {
		d.idle = map[string][]*directConn{}
	}
	d.idle[c.address] = append(d.idle[c.address], c)
	d.count++
	if d.sweep == nil {
		d.sweep = time.AfterFunc(idleTimeout, d.expire)
	}
}

// drop closes the first connections of an address.
func (d *direct) drop(address string, n int) {
	list := d.idle[address]
	n = min(n, len(list))
	for i, c := range list[:n] {
		_ = c.Close()
		list[i] = nil
	}
	d.count -= n
	if d.idle[address] = list[n:]; len(list) == n {
		delete(d.idle, address)
	}
}

// expire closes the connections that nobody has used for long.
func (d *direct) expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := time.Duration(0)
	for address, list := range d.idle {
		n := 0
		for n < len(list) && time.Since(list[n].since) >= idleTimeout {
			n++
		}
		if n < len(list) {
			next = max(next, time.Since(list[n].since))
		}
		d.drop(address, n)
	}
	if d.sweep = nil; d.count > 0 {
		d.sweep = time.AfterFunc(idleTimeout-next, d.expire)
	}
}

func (d *direct) closeIdle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for address, list := range d.idle {
		d.drop(address, len(list))
	}
	if d.sweep != nil {
		d.sweep.Stop()
		d.sweep = nil
	}
}

package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/trace"
)

// Registered registers a collector and returns it; where the same one is registered
// already, it returns that. A nil registerer takes nothing.
func Registered[C prometheus.Collector](r prometheus.Registerer, c C) C {
	if r == nil {
		return c
	}
	if already, ok := errors.AsType[prometheus.AlreadyRegisteredError](r.Register(c)); ok {
		if existing, ok := already.ExistingCollector.(C); ok {
			return existing
		}
	}
	// Any other error means that two parts of the program fight for a name: the figures of
	// the later one are missing, which is no reason to stop serving.
	return c
}

// Label bounds the values of a metric's label: past so many, values are "other".
type Label struct {
	most  int
	mu    sync.RWMutex
	known map[string]bool
}

// NewLabel makes a label that has at most so many values of its own, the known ones among them.
func NewLabel(most int, known ...string) *Label {
	l := &Label{most: most, known: map[string]bool{}}
	for _, v := range known {
		l.known[v] = true
	}
	return l
}

// Value is the value, or "other".
func (l *Label) Value(v string) string {
	l.mu.RLock()
	known := l.known[v]
	l.mu.RUnlock()
	if known {
		return v
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if v == "" || !l.known[v] && len(l.known) >= l.most {
		return "other"
	}
	l.known[v] = true
	return v
}

// exemplar names the trace of a span that is recorded; nil for none.
func exemplar(ctx context.Context) prometheus.Labels {
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() || !span.SpanContext().IsSampled() {
		return nil
	}
	return prometheus.Labels{"trace_id": span.SpanContext().TraceID().String()}
}

// Observe adds a duration, in seconds, with the trace of ctx as its exemplar.
func Observe(ctx context.Context, o prometheus.Observer, d time.Duration) {
	if labels := exemplar(ctx); labels != nil {
		if with, ok := o.(prometheus.ExemplarObserver); ok {
			with.ObserveWithExemplar(d.Seconds(), labels)
			return
		}
	}
	o.Observe(d.Seconds())
}

// Count adds to a counter, with the trace of ctx as its exemplar.
func Count(ctx context.Context, c prometheus.Counter, n float64) {
	if labels := exemplar(ctx); labels != nil {
		if with, ok := c.(prometheus.ExemplarAdder); ok {
			with.AddWithExemplar(n, labels)
			return
		}
	}
	c.Add(n)
}

// Handler answers /metrics, /healthz (200 while the process works) and /readyz (200 while
// ready gives nil, else 503 with the reason). A nil ready is always ready.
func Handler(g prometheus.Gatherer, ready func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	// Exemplars are part of OpenMetrics, for scrapers that ask for it.
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if ready != nil {
			if err := ready(r.Context()); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = w.Write([]byte(err.Error() + "\n"))
				return
			}
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	return mux
}

// ServeHTTP answers requests on the listener until ctx ends, and closes it.
func ServeHTTP(ctx context.Context, lis net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(lis) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", lis.Addr(), err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := s.Shutdown(end); err != nil {
		_ = s.Close()
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", lis.Addr(), err)
	}
	return nil
}

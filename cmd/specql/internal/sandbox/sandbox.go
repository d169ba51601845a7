// Package sandbox stands in for the cloud services that the bundled examples call, so that
// they run on a machine without credentials or a network: small HTTP servers on loopback
// that check what the real services check first and answer in their form. Nothing leaves the
// machine, and every answer says that it is not live.
package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// maxBody bounds a request.
const maxBody = 8 << 20

// Endpoint is a stand-in for one service.
type Endpoint struct {
	// Name of the service, such as Stripe.
	Name string
	// Variable that the examples' registry takes the address from.
	Variable string
	// URL of the stand-in.
	URL     string
	server  *http.Server
	handler http.Handler
}

// Sandbox is all stand-ins.
type Sandbox struct {
	Endpoints []*Endpoint
	// ServiceAccount is a Google service account key whose tokens come from the stand-in.
	ServiceAccount string
	serving        sync.WaitGroup
}

// Start serves a stand-in for every service. Close ends them.
func Start() (*Sandbox, error) {
	google, err := newGoogle()
	if err != nil {
		return nil, err
	}
	s := &Sandbox{Endpoints: []*Endpoint{
		{Name: "Stripe", Variable: "SPECQL_EXAMPLES_STRIPE_URL", handler: newStripe()},
		{Name: "SendGrid", Variable: "SPECQL_EXAMPLES_SENDGRID_URL", handler: newSendGrid()},
		{Name: "Amazon S3", Variable: "SPECQL_EXAMPLES_S3_URL", handler: newS3()},
		{Name: "AWS Lambda", Variable: "SPECQL_EXAMPLES_LAMBDA_URL", handler: newLambda()},
		{Name: "Google Cloud Functions", Variable: "SPECQL_EXAMPLES_GCF_URL", handler: google},
		{Name: "Azure Functions", Variable: "SPECQL_EXAMPLES_AZURE_URL", handler: newAzure()},
	}}
	for _, e := range s.Endpoints {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, errors.Join(fmt.Errorf("sandbox: %w", err), s.Close())
		}
		e.URL = "http://" + lis.Addr().String()
		e.server = &http.Server{
			Handler: bounded(e.handler), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		}
		s.serving.Go(func() { _ = e.server.Serve(lis) })
	}
	s.ServiceAccount, err = google.serviceAccount(s.url("SPECQL_EXAMPLES_GCF_URL"))
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Sandbox) url(variable string) string {
	for _, e := range s.Endpoints {
		if e.Variable == variable {
			return e.URL
		}
	}
	return ""
}

// Close ends every stand-in.
func (s *Sandbox) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var errs []error
	for _, e := range s.Endpoints {
		if e.server == nil {
			continue
		}
		if err := e.server.Shutdown(ctx); err != nil {
			errs = append(errs, e.server.Close())
		}
	}
	s.serving.Wait()
	return errors.Join(errs...)
}

// bounded limits bodies and marks every answer.
func bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Specql-Sandbox", "true")
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		h.ServeHTTP(w, r)
	})
}

// memory keeps values by key, the newest so many.
type memory[V any] struct {
	mu    sync.Mutex
	items map[string]V
	order []string
}

const remembered = 10_000

func (m *memory[V]) get(key string) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.items[key]
	return v, ok
}

func (m *memory[V]) put(key string, v V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.items == nil {
		m.items = map[string]V{}
	}
	if _, ok := m.items[key]; !ok {
		m.order = append(m.order, key)
	}
	m.items[key] = v
	if len(m.order) > remembered {
		delete(m.items, m.order[0])
		m.order = m.order[1:]
	}
}

func (m *memory[V]) remove(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.items, key)
	for i, k := range m.order {
		if k == key {
			m.order = append(m.order[:i], m.order[i+1:]...)
			return
		}
	}
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// readObject reads a JSON object; an empty body is an empty one.
func readObject(r *http.Request) (map[string]any, error) {
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	if len(raw) == 0 {
		return out, nil
	}
	if err := json.Unmarshal(raw, &out); err != nil {
		return nil, fmt.Errorf("the body is not a JSON object: %w", err)
	}
	return out, nil
}

// newID makes an id such as ch_sandbox_0a1b….
func newID(prefix string) string {
	var b [12]byte
	_, _ = rand.Read(b[:])
	return prefix + "_sandbox_" + hex.EncodeToString(b[:])
}

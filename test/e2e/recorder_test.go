package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
)

// request is a call that arrived at the recorder.
type request struct {
	// service and operation are the two parts of the path.
	service, operation string
	body               map[string]any
	header             http.Header
}

func (r request) name() string { return r.service + "." + r.operation }

// recorder is the HTTP service behind every http entry of the test registry. It answers {} unless a test says otherwise.
type recorder struct {
	*httptest.Server

	mu       sync.Mutex
	requests []request
	answers  map[string]func(http.ResponseWriter, *http.Request, request)
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	r := &recorder{answers: map[string]func(http.ResponseWriter, *http.Request, request){}}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

// ServeHTTP implements http.Handler.
func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	service, operation, _ := strings.Cut(strings.Trim(req.URL.Path, "/"), "/")
	got := request{service: service, operation: operation, header: req.Header.Clone()}
	raw, _ := io.ReadAll(req.Body)
	_ = json.Unmarshal(raw, &got.body)
	r.mu.Lock()
	r.requests = append(r.requests, got)
	answer := r.answers[got.name()]
	r.mu.Unlock()
	if answer != nil {
		answer(w, req, got)
		return
	}
	respond(w, http.StatusOK, map[string]any{})
}

// on sets what a call of service.operation is answered with.
func (r *recorder) on(name string, answer func(http.ResponseWriter, *http.Request, request)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers[name] = answer
}

// says answers with a body.
func (r *recorder) says(name string, status int, body map[string]any) {
	r.on(name, func(w http.ResponseWriter, _ *http.Request, _ request) { respond(w, status, body) })
}

// calls are the names of what arrived, in order.
func (r *recorder) calls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	names := make([]string, 0, len(r.requests))
	for _, req := range r.requests {
		names = append(names, req.name())
	}
	return names
}

// of are the requests of one name, in order.
func (r *recorder) of(name string) []request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.requests), func(req request) bool { return req.name() != name })
}

func respond(w http.ResponseWriter, status int, body map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

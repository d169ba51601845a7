// Package console shows runs in a browser: pages made on the server that change nothing, with
// no script and nothing from elsewhere.
package console

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

//go:embed *.html
var pages embed.FS

// Store is what the console reads.
type Store interface {
	Run(ctx context.Context, id string) (*store.Run, error)
	Jobs(ctx context.Context, runID string, after int64) ([]*store.Job, error)
	Runs(ctx context.Context, f store.RunFilter) ([]*store.Run, error)
	AlertStates(ctx context.Context) ([]*store.AlertState, error)
}

const pageSize = 100

// New makes the console's handler. It asks for a token where who does, and tells denials of who is refused.
func New(s Store, who *auth.Authenticator, logger *slog.Logger, denials *mesh.Denials) (http.Handler, error) {
	t, err := template.New("").Funcs(template.FuncMap{
		"ago": func(t time.Time) string {
			if t.IsZero() {
				return ""
			}
			return t.Local().Format("2006-01-02 15:04:05")
		},
		"took": func(from, to time.Time) string {
			if from.IsZero() || to.IsZero() {
				return ""
			}
			return to.Sub(from).Round(time.Millisecond).String()
		},
		"json": func(raw json.RawMessage) string {
			if len(raw) > 16<<10 {
				return string(raw[:16<<10]) + "…"
			}
			return string(raw)
		},
	}).ParseFS(pages, "*.html")
	if err != nil {
		return nil, fmt.Errorf("read the console's pages: %w", err)
	}
	h := &handler{store: s, who: who, logger: logger, denials: denials, pages: t, sessions: sessions{now: time.Now}}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", h.admit(h.runs))
	mux.Handle("GET /runs/{id}", h.admit(h.run))
	mux.Handle("GET /alerts", h.admit(h.alerts))
	mux.HandleFunc("GET /login", h.loginPage)
	mux.HandleFunc("POST /login", h.login)
	mux.HandleFunc("POST /logout", h.logout)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	return guard(http.NewCrossOriginProtection().Handler(mux)), nil
}

type handler struct {
	store    Store
	who      *auth.Authenticator
	logger   *slog.Logger
	denials  *mesh.Denials
	pages    *template.Template
	sessions sessions
}

// guard keeps pages of other origins from reading, framing or scripting these.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A name that somebody else's DNS points here is a page of theirs that reads ours.
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if ip := net.ParseIP(strings.Trim(host, "[]")); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "the console answers to localhost and loopback addresses alone", http.StatusMisdirectedRequest)
			return
		}
		if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" && r.Header.Get("Sec-Fetch-Mode") != "navigate" {
			http.Error(w, "the console answers to no page of others", http.StatusForbidden)
			return
		}
		header := w.Header()
		header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("X-Frame-Options", "DENY")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

func (h *handler) runs(w http.ResponseWriter, r *http.Request) {
	caller := auth.From(r.Context())
	tenant := r.URL.Query().Get("tenant")
	acting, err := caller.ActingFor(tenant)
	if err != nil {
		h.refuse(w, r, err)
		return
	}
	before := r.URL.Query().Get("before")
	if before != "" && uuid.Validate(before) != nil {
		http.Error(w, "before is no id of a run", http.StatusBadRequest)
		return
	}
	runs, err := h.store.Runs(r.Context(), store.RunFilter{Limit: pageSize, Before: before, Tenants: acting.Tenants()})
	if err != nil {
		h.fail(w, err)
		return
	}
	next := ""
	if len(runs) == pageSize {
		next = runs[len(runs)-1].ID
	}
	h.page(w, http.StatusOK, "runs.html", map[string]any{"Runs": runs, "Next": next, "Tenant": tenant, "Tenants": len(caller.Tenants()) != 1, "Caller": caller, "Out": h.who.Enabled()})
}

func (h *handler) alerts(w http.ResponseWriter, r *http.Request) {
	if err := auth.From(r.Context()).MaySeeAll(); err != nil {
		h.refuse(w, r, err)
		return
	}
	states, err := h.store.AlertStates(r.Context())
	if err != nil {
		h.fail(w, err)
		return
	}
	h.page(w, http.StatusOK, "alerts.html", map[string]any{"Alerts": states})
}

func (h *handler) run(w http.ResponseWriter, r *http.Request) {
	run, err := h.store.Run(r.Context(), r.PathValue("id"))
	if errors.Is(err, store.ErrNotFound) || err == nil && !auth.From(r.Context()).Sees(run.TenantID) {
		http.Error(w, "there is no such run", http.StatusNotFound)
		return
	}
	if err != nil {
		h.fail(w, err)
		return
	}
	jobs, err := h.store.Jobs(r.Context(), run.ID, 0)
	if err != nil {
		h.fail(w, err)
		return
	}
	h.page(w, http.StatusOK, "run.html", map[string]any{"Run": run, "Jobs": jobs, "Live": !run.Status.Final()})
}

func (h *handler) page(w http.ResponseWriter, code int, name string, data any) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	if err := h.pages.ExecuteTemplate(w, name, data); err != nil {
		h.logger.Warn("a console page broke off", "page", name, "error", err)
	}
}

func (h *handler) fail(w http.ResponseWriter, err error) {
	h.logger.Error("the console could not read the store", "error", err)
	http.Error(w, "the store did not answer; the orchestrator's log has the cause", http.StatusInternalServerError)
}

package console

import (
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/services/orchestrator/internal/auth"
)

const (
	cookieName  = "specql_console"
	sessionLife = 12 * time.Hour
	maxSessions = 1000
)

// sessions are the tokens of who has logged in, by the hash of what their cookie holds. The token
// itself is in no cookie: browsers send cookies to every port of a host.
type sessions struct {
	now   func() time.Time
	mu    sync.Mutex
	known map[[sha256.Size]byte]session
}

type session struct {
	token string
	until time.Time
}

func (s *sessions) begin(token string) (id string) {
	id = rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.known == nil {
		s.known = map[[sha256.Size]byte]session{}
	}
	oldest, at := [sha256.Size]byte{}, time.Time{}
	for k, v := range s.known {
		if !now.Before(v.until) {
			delete(s.known, k)
		} else if at.IsZero() || v.until.Before(at) {
			oldest, at = k, v.until
		}
	}
	if len(s.known) >= maxSessions {
		delete(s.known, oldest)
	}
	s.known[sha256.Sum256([]byte(id))] = session{token, now.Add(sessionLife)}
	return id
}

func (s *sessions) token(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.known[sha256.Sum256([]byte(id))]; ok && s.now().Before(v.until) {
		return v.token
	}
	return ""
}

func (s *sessions) end(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, sha256.Sum256([]byte(id)))
}

// admit tells a handler who asks. Each request is looked at anew, so that a token that was
// taken back shows nothing more.
func (h *handler) admit(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := auth.Anonymous("anonymous", "")
		if h.who.Enabled() {
			token, given := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
			if !given {
				if cookie, err := r.Cookie(cookieName); err == nil {
					token = h.sessions.token(cookie.Value)
				}
				if token == "" {
					http.Redirect(w, r, "/login", http.StatusSeeOther)
					return
				}
			}
			var err error
			if caller, err = h.who.Authenticate(r.Context(), token, auth.Host(r.RemoteAddr)); err == nil {
				err = caller.May(auth.Viewer)
			}
			if err != nil && !given {
				h.told(r, err)
				h.page(w, http.StatusUnauthorized, "login.html", map[string]any{"Error": status.Convert(err).Message()})
				return
			}
			if err != nil {
				h.refuse(w, r, err)
				return
			}
		}
		next(w, r.WithContext(auth.With(r.Context(), caller)))
	})
}

// told writes down who was refused.
func (h *handler) told(r *http.Request, err error) {
	h.denials.Tell(r.Context(), "console", r.RemoteAddr, "", err)
}

// refuse answers with the text of a gRPC status.
func (h *handler) refuse(w http.ResponseWriter, r *http.Request, err error) {
	h.told(r, err)
	code := http.StatusForbidden
	switch status.Code(err) { //nolint:exhaustive // the rest is refused
	case codes.Unauthenticated:
		w.Header().Set("WWW-Authenticate", "Bearer")
		code = http.StatusUnauthorized
	case codes.InvalidArgument:
		code = http.StatusBadRequest
	case codes.Unavailable:
		code = http.StatusServiceUnavailable
	}
	http.Error(w, status.Convert(err).Message(), code)
}

func (h *handler) loginPage(w http.ResponseWriter, r *http.Request) {
	if !h.who.Enabled() {
		http.Redirect(w, r, "/", http.StatusSeeOther)
		return
	}
	h.page(w, http.StatusOK, "login.html", map[string]any{})
}

func (h *handler) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
	token := strings.TrimSpace(r.PostFormValue("token"))
	caller, err := h.who.Authenticate(r.Context(), token, auth.Host(r.RemoteAddr))
	if err == nil {
		err = caller.May(auth.Viewer)
	}
	if err != nil {
		h.told(r, err)
		h.page(w, http.StatusUnauthorized, "login.html", map[string]any{"Error": status.Convert(err).Message()})
		return
	}
	// Secure would keep it from a console on loopback, where there is no TLS.
	http.SetCookie(w, &http.Cookie{ //nolint:gosec // see above
		Name: cookieName, Value: h.sessions.begin(token), Path: "/", MaxAge: int(sessionLife.Seconds()), HttpOnly: true, SameSite: http.SameSiteStrictMode,
	})
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (h *handler) logout(w http.ResponseWriter, r *http.Request) {
	if cookie, err := r.Cookie(cookieName); err == nil {
		h.sessions.end(cookie.Value)
	}
	http.SetCookie(w, &http.Cookie{Name: cookieName, Path: "/", MaxAge: -1, HttpOnly: true, SameSite: http.SameSiteStrictMode}) //nolint:gosec // as above
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

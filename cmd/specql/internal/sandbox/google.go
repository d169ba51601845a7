package sandbox

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"
)

// google answers as a Cloud Function behind identity tokens: it gives out tokens for the
// service account that it made, and the function, which counts and averages numbers, runs
// for callers that show a token.
type google struct {
	mux *http.ServeMux
	key *rsa.PrivateKey
}

func newGoogle() (*google, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	g := &google{mux: http.NewServeMux(), key: key}
	g.mux.HandleFunc("POST /token", g.token)
	g.mux.HandleFunc("POST /", analyse)
	return g, nil
}

// ServeHTTP implements http.Handler.
func (g *google) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.mux.ServeHTTP(w, r) }

// serviceAccount is a key file whose tokens come from this sandbox.
func (g *google) serviceAccount(url string) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(g.key)
	if err != nil {
		return "", fmt.Errorf("sandbox: %w", err)
	}
	raw, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "specql-sandbox", "private_key_id": "sandbox",
		"private_key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"client_email": "sandbox@specql-sandbox.iam.gserviceaccount.com", "client_id": "0", "token_uri": url + "/token",
	})
	return string(raw), err
}

// token gives an identity token for an assertion. It is signed by nobody and worth nothing.
func (g *google) token(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.PostForm.Get("assertion") == "" {
		answer(w, http.StatusBadRequest, map[string]any{"error": "invalid_grant", "error_description": "no assertion"})
		return
	}
	audience := "sandbox"
	if parts := strings.Split(r.PostForm.Get("assertion"), "."); len(parts) == 3 {
		var claims struct {
			Target string `json:"target_audience"`
		}
		if raw, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil && json.Unmarshal(raw, &claims) == nil {
			audience = claims.Target
		}
	}
	now := time.Now().Unix()
	part := func(v any) string {
		raw, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(raw)
	}
	id := part(map[string]any{"alg": "RS256", "typ": "JWT"}) + "." +
		part(map[string]any{"iss": "specql-sandbox", "aud": audience, "iat": now, "exp": now + 3600, "sub": "sandbox"}) + "." +
		base64.RawURLEncoding.EncodeToString([]byte("sandbox"))
	answer(w, http.StatusOK, map[string]any{"id_token": id, "access_token": id, "token_type": "Bearer", "expires_in": 3600})
}

func analyse(w http.ResponseWriter, r *http.Request) {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); !ok || token == "" {
		http.Error(w, "Your client does not have permission to the requested URL.", http.StatusForbidden)
		return
	}
	in, err := readObject(r)
	if err != nil {
		answer(w, http.StatusBadRequest, map[string]any{"error": err.Error()})
		return
	}
	numbers, err := numbersOf(in)
	if err != nil {
		answer(w, http.StatusBadRequest, map[string]any{"error": err.Error()})
		return
	}
	w.Header().Set("Function-Execution-Id", newID("fn"))
	out := statistics(numbers)
	out["livemode"] = false
	answer(w, http.StatusOK, out)
}

// numbersOf finds the numbers to look at: in values, numbers or data.
func numbersOf(in map[string]any) ([]float64, error) {
	for _, name := range []string{"values", "numbers", "data"} {
		list, ok := in[name].([]any)
		if !ok {
			continue
		}
		out := make([]float64, 0, len(list))
		for i, v := range list {
			n, ok := v.(float64)
			if !ok {
				return nil, fmt.Errorf("%s[%d] is not a number", name, i)
			}
			out = append(out, n)
		}
		if len(out) == 0 {
			return nil, fmt.Errorf("%s is empty", name)
		}
		return out, nil
	}
	return nil, fmt.Errorf("there are no values")
}

func statistics(numbers []float64) map[string]any {
	sorted := slices.Sorted(slices.Values(numbers))
	n := len(sorted)
	sum := 0.0
	for _, v := range sorted {
		sum += v
	}
	mean := sum / float64(n)
	squares := 0.0
	for _, v := range sorted {
		squares += (v - mean) * (v - mean)
	}
	median := sorted[n/2]
	if n%2 == 0 {
		median = (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return map[string]any{
		"count": n, "sum": sum, "mean": mean, "median": median, "min": sorted[0], "max": sorted[n-1],
		"stddev": math.Sqrt(squares / float64(n)),
	}
}

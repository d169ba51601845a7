package sandbox

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// stripe answers as the Stripe API does: form encoded bodies, a bearer key, idempotent by
// Idempotency-Key, errors with type and code.
type stripe struct {
	answers memory[reply]          // by idempotency key
	charges memory[map[string]any] // by id
}

type reply struct {
	status int
	body   any
	of     string // the request that the key belongs to
}

func newStripe() http.Handler {
	s := &stripe{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/charges", s.once(s.charge))
	mux.HandleFunc("POST /v1/refunds", s.once(s.refund))
	mux.HandleFunc("GET /v1/charges/{id}", s.once(s.read))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusNotFound, stripeError("", "Unrecognized request URL ("+r.Method+": "+r.URL.Path+")."))
	})
	return mux
}

// once checks the key, and answers a request that was made before as it was answered then.
func (s *stripe) once(do func(r *http.Request) (int, any)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		key, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if user, _, basic := r.BasicAuth(); basic {
			key, bearer = user, true
		}
		if !bearer || key == "" {
			answer(w, http.StatusUnauthorized, stripeError("", "You did not provide an API key."))
			return
		}
		if err := r.ParseForm(); err != nil {
			answer(w, http.StatusBadRequest, stripeError("", "Invalid form: "+err.Error()))
			return
		}
		idempotency := r.Header.Get("Idempotency-Key")
		of := r.Method + r.URL.Path + r.PostForm.Encode()
		if before, ok := s.answers.get(idempotency); ok && idempotency != "" && r.Method == http.MethodPost {
			if before.of != of {
				answer(w, http.StatusBadRequest, stripeError("idempotency_error", "Keys for idempotent requests can only be used with the same parameters they were first used with."))
				return
			}
			w.Header().Set("Idempotent-Replayed", "true")
			answer(w, before.status, before.body)
			return
		}
		status, body := do(r)
		if idempotency != "" && r.Method == http.MethodPost {
			s.answers.put(idempotency, reply{status, body, of})
		}
		answer(w, status, body)
	}
}

func (s *stripe) charge(r *http.Request) (int, any) {
	amount, err := strconv.ParseInt(r.PostForm.Get("amount"), 10, 64)
	switch {
	case err != nil || amount <= 0:
		return http.StatusBadRequest, stripeError("parameter_invalid_integer", "Invalid integer: "+r.PostForm.Get("amount"))
	case r.PostForm.Get("currency") == "":
		return http.StatusBadRequest, stripeError("parameter_missing", "Missing required param: currency.")
	}
	source := r.PostForm.Get("source")
	if source == "tok_chargeDeclined" {
		return http.StatusPaymentRequired, map[string]any{"error": map[string]any{
			"type": "card_error", "code": "card_declined", "decline_code": "generic_decline", "message": "Your card was declined.",
		}}
	}
	c := map[string]any{
		"id": newID("ch"), "object": "charge", "livemode": false, "amount": amount, "amount_refunded": 0,
		"currency": strings.ToLower(r.PostForm.Get("currency")), "status": "succeeded", "paid": true, "captured": true, "refunded": false,
		"created": time.Now().Unix(), "metadata": nested(r.PostForm, "metadata"),
		"description": r.PostForm.Get("description"), "source": map[string]any{"id": source, "object": "card", "last4": "4242"},
	}
	s.charges.put(c["id"].(string), c)
	return http.StatusOK, c
}

func (s *stripe) refund(r *http.Request) (int, any) {
	c, ok := s.charges.get(r.PostForm.Get("charge"))
	if !ok {
		return http.StatusNotFound, stripeError("resource_missing", "No such charge: '"+r.PostForm.Get("charge")+"'")
	}
	amount, _ := c["amount"].(int64)
	if text := r.PostForm.Get("amount"); text != "" {
		part, err := strconv.ParseInt(text, 10, 64)
		if err != nil || part <= 0 || part > amount {
			return http.StatusBadRequest, stripeError("", "Refund amount is greater than the charge or not an amount.")
		}
		amount = part
	}
	return http.StatusOK, map[string]any{
		"id": newID("re"), "object": "refund", "livemode": false, "amount": amount, "charge": c["id"], "currency": c["currency"],
		"status": "succeeded", "created": time.Now().Unix(), "reason": r.PostForm.Get("reason"),
	}
}

func (s *stripe) read(r *http.Request) (int, any) {
	c, ok := s.charges.get(r.PathValue("id"))
	if !ok {
		return http.StatusNotFound, stripeError("resource_missing", "No such charge: '"+r.PathValue("id")+"'")
	}
	return http.StatusOK, c
}

func stripeError(code, message string) map[string]any {
	e := map[string]any{"type": "invalid_request_error", "message": message}
	if code != "" {
		e["code"] = code
	}
	return map[string]any{"error": e}
}

// nested are the values of metadata[name]=value.
func nested(form url.Values, name string) map[string]string {
	out := map[string]string{}
	for key, values := range form {
		if inner, ok := strings.CutPrefix(key, name+"["); ok && strings.HasSuffix(inner, "]") && len(values) > 0 {
			out[strings.TrimSuffix(inner, "]")] = values[0]
		}
	}
	return out
}

package sandbox

import (
	"net/http"
	"strings"
)

// newSendGrid answers as SendGrid's v3 mail API does: 202 without a body and an X-Message-Id.
func newSendGrid() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v3/mail/send", func(w http.ResponseWriter, r *http.Request) {
		if key, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); !ok || key == "" {
			sendGridError(w, http.StatusUnauthorized, "The provided authorization grant is invalid, expired, or revoked", "")
			return
		}
		mail, err := readObject(r)
		if err != nil {
			sendGridError(w, http.StatusBadRequest, err.Error(), "")
			return
		}
		people, _ := mail["personalizations"].([]any)
		from, _ := mail["from"].(map[string]any)
		switch {
		case len(people) == 0:
			sendGridError(w, http.StatusBadRequest, "The personalizations field is required and must have at least one personalization.", "personalizations")
			return
		case !isAddress(from["email"]):
			sendGridError(w, http.StatusBadRequest, "The from object must be provided for every email send. It is an object that requires the email parameter.", "from.email")
			return
		case mail["content"] == nil && mail["template_id"] == nil:
			sendGridError(w, http.StatusBadRequest, "Unless a valid template_id is provided, the content parameter is required.", "content")
			return
		}
		w.Header().Set("X-Message-Id", newID("msg"))
		w.WriteHeader(http.StatusAccepted)
	})
	return mux
}

func sendGridError(w http.ResponseWriter, status int, message, field string) {
	e := map[string]any{"message": message, "field": nil, "help": nil}
	if field != "" {
		e["field"] = field
	}
	answer(w, status, map[string]any{"errors": []any{e}})
}

func isAddress(v any) bool {
	text, _ := v.(string)
	return strings.Contains(text, "@")
}

package sandbox

import "net/http"

// newAzure answers as an Azure Function with an HTTP trigger and a function key. The
// function takes notifications.
func newAzure() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/{function}", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Functions-Key") == "" && r.URL.Query().Get("code") == "" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		in, err := readObject(r)
		if err != nil {
			answer(w, http.StatusBadRequest, map[string]any{"error": err.Error()})
			return
		}
		answer(w, http.StatusOK, map[string]any{
			"id": newID("notification"), "notification_id": newID("notification"), "status": "sent", "delivered": true,
			"channel": in["channel"], "recipient": in["recipient"], "livemode": false,
		})
	})
	return mux
}

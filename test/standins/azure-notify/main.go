// Command azure-notify speaks the documented form of an Azure Functions HTTP trigger with
// authorization level function: POST /api/notify with the key in x-functions-key or ?code=.
// Without the key it answers 401 with no body, as Azure does; other functions are 404.
//
// It prints "listening http://HOST:PORT" once it listens, or https with -tls-cert and -tls-key.
package main

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"strings"
	"time"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	function := flag.String("function", "notify", "name of the function")
	key := flag.String("key", "local-function-key", "the function's key")
	tlsCert := flag.String("tls-cert", "", "file of a certificate, to speak https")
	tlsKey := flag.String("tls-key", "", "file of its key")
	flag.Parse()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/api/"+*function, func(w http.ResponseWriter, r *http.Request) { trigger(w, r, *key) })
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	if *tlsCert != "" || *tlsKey != "" {
		fmt.Printf("listening https://%s\n", l.Addr())
		log.Fatal(s.ServeTLS(l, *tlsCert, *tlsKey))
	}
	fmt.Printf("listening http://%s\n", l.Addr())
	log.Fatal(s.Serve(l))
}

func trigger(w http.ResponseWriter, r *http.Request, key string) {
	given := r.Header.Get("X-Functions-Key")
	if given == "" {
		given = r.URL.Query().Get("code")
	}
	if subtle.ConstantTimeCompare([]byte(given), []byte(key)) != 1 {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if r.Method != http.MethodPost && r.Method != http.MethodGet {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	var in struct {
		Recipient string `json:"recipient"`
		To        string `json:"to"`
		Message   string `json:"message"`
		Channel   string `json:"channel"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&in); err != nil {
		http.Error(w, "the body is not JSON: "+err.Error(), http.StatusBadRequest)
		return
	}
	if in.Recipient == "" {
		in.Recipient = in.To
	}
	if strings.TrimSpace(in.Message) == "" {
		http.Error(w, "message is empty", http.StatusBadRequest)
		return
	}
	if in.Channel == "" {
		in.Channel = "email"
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	err := json.NewEncoder(w).Encode(map[string]any{
		"notification_id": rand.Text(), "status": "queued", "recipient": in.Recipient, "channel": in.Channel,
		"length": len(in.Message), "idempotency_key": r.Header.Get("Idempotency-Key"),
	})
	if err != nil {
		log.Print(err)
	}
}

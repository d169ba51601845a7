// Command gcf-analysis is a Cloud Function on Google's functions framework: it answers
// {"numbers": […]} with their count, sum, mean, median, standard deviation, minimum and maximum.
//
// It prints "listening http://HOST:PORT" once it answers.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/GoogleCloudPlatform/functions-framework-go/funcframework"
	"github.com/GoogleCloudPlatform/functions-framework-go/functions"
)

type request struct {
	// Numbers to analyse; Data is another name of it.
	Numbers []float64 `json:"numbers"`
	Data    []float64 `json:"data"`
}

type response struct {
	Count          int     `json:"count"`
	Sum            float64 `json:"sum"`
	Mean           float64 `json:"mean"`
	Median         float64 `json:"median"`
	Stddev         float64 `json:"stddev"`
	Min            float64 `json:"min"`
	Max            float64 `json:"max"`
	IdempotencyKey string  `json:"idempotency_key,omitempty"`
}

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	flag.Parse()
	functions.HTTP("analyze", analyze)
	if err := os.Setenv("FUNCTION_TARGET", "analyze"); err != nil {
		log.Fatal(err)
	}
	host, port, err := freePort(*listen)
	if err != nil {
		log.Fatal(err)
	}
	go announce(net.JoinHostPort(host, port))
	log.Fatal(funcframework.StartHostPort(host, port))
}

// freePort chooses the port: the framework listens itself and does not tell which it got.
func freePort(address string) (host, port string, err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return "", "", fmt.Errorf("listen: %w", err)
	}
	address = l.Addr().String()
	if err := l.Close(); err != nil {
		return "", "", fmt.Errorf("listen: %w", err)
	}
	return net.SplitHostPort(address)
}

func announce(address string) {
	for {
		c, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			_ = c.Close()
			fmt.Printf("listening http://%s\n", address)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func analyze(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Function-Execution-Id", r.Header.Get("Function-Execution-Id"))
	if r.Method != http.MethodPost {
		http.Error(w, "POST only", http.StatusMethodNotAllowed)
		return
	}
	var in request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 10<<20)).Decode(&in); err != nil {
		http.Error(w, "the body is not JSON with numbers: "+err.Error(), http.StatusBadRequest)
		return
	}
	numbers := append(in.Numbers, in.Data...)
	if len(numbers) == 0 {
		http.Error(w, "numbers is empty", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := summary(numbers)
	out.IdempotencyKey = r.Header.Get("Idempotency-Key")
	if err := json.NewEncoder(w).Encode(out); err != nil {
		log.Print(err)
	}
}

func summary(numbers []float64) response {
	slices.Sort(numbers)
	n := len(numbers)
	r := response{Count: n, Min: numbers[0], Max: numbers[n-1], Median: numbers[n/2]}
	if n%2 == 0 {
		r.Median = (numbers[n/2-1] + numbers[n/2]) / 2
	}
	for _, v := range numbers {
		r.Sum += v
	}
	r.Mean = r.Sum / float64(n)
	for _, v := range numbers {
		r.Stddev += (v - r.Mean) * (v - r.Mean)
	}
	r.Stddev = math.Sqrt(r.Stddev / float64(n))
	return r
}

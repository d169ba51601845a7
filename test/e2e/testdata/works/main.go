// Command works is the program of a container that takes a given time, and tells by its own clock how long it took.
package main

import (
	"encoding/json"
	"log"
	"os"
	"time"
)

func main() {
	began := time.Now()
	var job struct {
		Seconds float64 `json:"seconds"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		log.Fatal(err)
	}
	time.Sleep(time.Duration(job.Seconds * float64(time.Second)))
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"took": time.Since(began).Seconds()}); err != nil {
		log.Fatal(err)
	}
}

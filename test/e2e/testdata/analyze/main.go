// Command analyze is the program of the test's container: it adds the values of records up.
package main

import (
	"encoding/json"
	"log"
	"os"
)

func main() {
	var job struct {
		Dataset []struct {
			Value float64 `json:"value"`
		} `json:"dataset"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		log.Fatal(err)
	}
	sum := 0.0
	for _, record := range job.Dataset {
		sum += record.Value
	}
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"records": len(job.Dataset), "sum": sum}); err != nil {
		log.Fatal(err)
	}
}

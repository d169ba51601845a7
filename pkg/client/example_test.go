package client_test

import (
	"context"
	"fmt"

	"github.com/specql/mesh/pkg/client"
)

func Example() {
	run, err := client.Execute(context.Background(), "127.0.0.1:7350", client.Action{
		Entity: "payment", Action: "process_payment", Input: map[string]any{"amount_cents": 1200},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(run.GetOutput().AsInterface())
}

// Program is the guest of the tests: it does what its first argument says.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

func main() {
	raw, err := io.ReadAll(os.Stdin)
	if err != nil {
		fail(err)
	}
	switch os.Args[1] {
	case "greet":
		var in struct{ Name string }
		if err := json.Unmarshal(raw, &in); err != nil {
			fail(err)
		}
		fmt.Fprintln(os.Stderr, "greeting "+in.Name)
		_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"greeting": "hello " + in.Name})
	case "spin":
		fmt.Fprintln(os.Stderr, "spinning")
		for i := 0; ; i++ {
			if i < 0 {
				fmt.Println(i)
			}
		}
	case "sleep":
		time.Sleep(time.Hour)
	case "big":
		fmt.Print(`"` + strings.Repeat("x", 5<<20) + `"`)
	case "hog":
		var all [][]byte
		for {
			all = append(all, make([]byte, 1<<20))
			all[len(all)-1][0] = 1
		}
	case "spy":
		_, fileErr := os.ReadFile("/etc/passwd")
		_, dialErr := os.ReadDir("/")
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"environment": len(os.Environ()), "file": fileErr != nil, "dir": dialErr != nil})
	case "text":
		fmt.Print("not JSON")
	default:
		fail(fmt.Errorf("cannot %s", os.Args[1]))
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(3)
}

// Command lambda-endpoint speaks the documented wire format of AWS Lambda's Invoke in front
// of real function processes, which it starts and serves with the documented Runtime API.
//
//	lambda-endpoint -function image-resize-service=./lambda-resize,memory=1024,timeout=3
//
// It prints "listening http://HOST:PORT" once it listens. With -secret-key it checks the
// Signature Version 4 of each request, without it only that there is one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on")
	region := flag.String("region", "us-east-1", "region that signatures must name")
	accessKey := flag.String("access-key", "", "access key id that signatures must name; any if empty")
	secretKey := flag.String("secret-key", "", "secret access key that signatures are checked with")
	var functions functionFlag
	flag.Var(&functions, "function", "NAME=PROGRAM[,memory=MB][,timeout=SECONDS][,concurrency=N][,version=V][,alias=NAME]; repeatable")
	flag.Parse()
	log.SetFlags(0)
	if err := run(*listen, &authorizer{region: *region, accessKey: *accessKey, secretKey: *secretKey}, functions); err != nil {
		log.Fatal(err)
	}
}

func run(listen string, auth *authorizer, functions functionFlag) error {
	if len(functions) == 0 {
		return errors.New("name at least one function with -function NAME=PROGRAM")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	api := &invokeAPI{auth: auth, functions: map[string]*function{}}
	for _, o := range functions {
		f := &function{options: o, slots: make(chan *environment, o.concurrency), region: auth.region}
		for range o.concurrency {
			f.slots <- &environment{function: f}
		}
		api.functions[o.name] = f
		defer f.close()
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s := &http.Server{Handler: api, ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	fmt.Printf("listening http://%s\n", l.Addr())
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
		return s.Close() //nolint:wrapcheck // the last thing that happens
	}
}

// functionOptions is one -function.
type functionOptions struct {
	name, program string
	memoryMB      int
	timeout       time.Duration
	concurrency   int
	version       string
	alias         string
}

type functionFlag []functionOptions

func (f *functionFlag) String() string { return "" }

// Set implements flag.Value.
func (f *functionFlag) Set(value string) error {
	name, rest, ok := strings.Cut(value, "=")
	if !ok || name == "" {
		return errors.New("write NAME=PROGRAM")
	}
	parts := strings.Split(rest, ",")
	program, err := filepath.Abs(parts[0])
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	o := functionOptions{name: name, program: program, memoryMB: 128, timeout: 3 * time.Second, concurrency: 2, version: "$LATEST"}
	for _, p := range parts[1:] {
		key, v, _ := strings.Cut(p, "=")
		switch key {
		case "memory":
			o.memoryMB, err = strconv.Atoi(v)
		case "timeout":
			var s float64
			s, err = strconv.ParseFloat(v, 64)
			o.timeout = time.Duration(s * float64(time.Second))
		case "concurrency":
			o.concurrency, err = strconv.Atoi(v)
		case "version":
			o.version = v
		case "alias":
			o.alias = v
		default:
			err = errors.New("unknown key")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	*f = append(*f, o)
	return nil
}

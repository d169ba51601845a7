package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// httpSteps measures a GET as a step of the HTTP runner beside that of net/http alone. The service
// that is called is the same process in both cases.
func httpSteps(ctx context.Context, s *steps) (err error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", s.bin+string(filepath.Separator), "./http-target") //nolint:gosec // our own
	cmd.Dir, cmd.Env = filepath.Join(s.root, "bench"), append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the target: %w\n%s", err, out)
	}
	target, address, err := start(ctx, s.dir, "http-target", filepath.Join(s.bin, "http-target"))
	if err != nil {
		return err
	}
	defer target.end()
	r, err := s.startRunner(ctx, "http-runner", "--max-concurrency", "64")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	e, err := newEcho(ctx, s.ca)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.end()) }()
	url := "http://" + address
	for _, n := range []int{1, 8, 64} {
		if err := httpWindows(ctx, s, r, e, url, n); err != nil {
			return err
		}
	}
	return nil
}

// httpWindows measures rates of so many at once, in short windows that take turns.
func httpWindows(ctx context.Context, s *steps, r *stepRunner, e *echo, url string, n int) error {
	const window = 500 * time.Millisecond
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	defer client.CloseIdleConnections()
	get := func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	streams, end, err := r.streams(ctx, n)
	if err != nil {
		return err
	}
	defer end()
	service := &runnerv1.Service{
		Name: "nothing", ExecutionType: "http", RunnerConfig: []byte(`{"base_url":"` + url + `"}`), SecurityPolicy: []byte(`{"allow_private_networks":true}`),
	}
	operation := &runnerv1.Operation{Name: "nothing", Config: []byte(`{"method":"GET","path":"/"}`)}
	step := func(context.Context) error {
		stream := <-streams
		defer func() { streams <- stream }()
		_, err := stream.execute(&runnerv1.Job{Service: service, Operation: operation})
		return err
	}
	var floors, rates, shares, echoes []float64
	var p50, floorP50 samples
	rounds := max(1, s.each/20)
	for round := range rounds + 1 {
		floor, floorTook, err := spin(ctx, n, window, get)
		if err != nil {
			return fmt.Errorf("net/http: %w", err)
		}
		rate, took, err := spin(ctx, n, window, step)
		if err != nil {
			return fmt.Errorf("http-runner: %w", err)
		}
		bare, _, err := spin(ctx, n, window, e.call)
		if err != nil {
			return fmt.Errorf("gRPC: %w", err)
		}
		if round > 0 { // the first warms up
			floors, rates, shares, echoes = append(floors, floor), append(rates, rate), append(shares, rate/floor), append(echoes, bare)
			p50, floorP50 = append(p50, took), append(floorP50, floorTook)
		}
	}
	s.sayf("%2d at once: net/http %6.0f a second (p50 %.3f ms)  gRPC call with mutual TLS %6.0f  http runner %6.0f (p50 %.3f ms), %.3f of net/http (%.3f–%.3f)", n, middle(floors),
		ms(floorP50.quantile(0.5)), middle(echoes), middle(rates), ms(p50.quantile(0.5)), middle(shares), slices.Min(shares), slices.Max(shares))
	return nil
}

func middle(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

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
	for _, n := range []int{1, 8, 64} {
		if err := httpWindows(ctx, s, []*program{target, r.program}, r, e, "http://"+address, n); err != nil {
			return err
		}
	}
	return nil
}

// httpWindows measures rates of so many at once, in short windows that take turns.
func httpWindows(ctx context.Context, s *steps, processes []*program, r *stepRunner, e *echo, url string, n int) error {
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
	step, end, err := r.caller(ctx, n, &runnerv1.Service{
		Name: "nothing", ExecutionType: "http", RunnerConfig: []byte(`{"base_url":"` + url + `"}`), SecurityPolicy: []byte(`{"allow_private_networks":true}`),
	}, &runnerv1.Operation{Name: "nothing", Config: []byte(`{"method":"GET","path":"/"}`)})
	if err != nil {
		return err
	}
	defer end()
	return s.windows(ctx, n, max(1, s.each/20), processes, contestant{"net/http", get}, contestant{"HTTP step of the runner", step}, contestant{"gRPC call with mutual TLS, both ends here", e.call})
}

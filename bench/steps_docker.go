package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// dockerImage is what the containers run: a static program that reads its input and answers with it.
const dockerImage = "specql-bench/answer:steps"

const answerProgram = `package main

import (
	"io"
	"os"
)

func main() {
	input, err := io.ReadAll(os.Stdin)
	if err == nil {
		_, err = os.Stdout.Write(input)
	}
	if err != nil {
		os.Exit(1)
	}
}
`

// dockerSteps measures a step of the docker runner beside the Engine API alone.
func dockerSteps(ctx context.Context, s *steps) (err error) {
	e := newDockerEngine()
	if err := e.image(ctx, s.bin); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, e.call(context.WithoutCancel(ctx), http.MethodDelete, "/images/"+dockerImage+"?force=1", nil, nil))
	}()
	r, err := s.startRunner(ctx, "docker-runner")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	config := map[string]any{"image": dockerImage, "pull_policy": "never"}
	policy := map[string]any{"allowed_images": []string{dockerImage}, "resource_limits": map[string]any{"memory_mb": 64, "cpu_cores": 1, "processes": 32}}
	step := func(name string, config map[string]any) func(context.Context) error {
		service := &runnerv1.Service{Name: name, ExecutionType: "docker"}
		if service.RunnerConfig, err = json.Marshal(config); err == nil {
			service.SecurityPolicy, err = json.Marshal(policy)
		}
		failed := err
		return func(context.Context) error {
			if failed != nil {
				return failed
			}
			finished, err := r.execute(&runnerv1.Job{Service: service, Operation: &runnerv1.Operation{Name: "answer"}, Input: []byte(answer)})
			if err == nil && string(finished.GetOutput()) != answer {
				err = fmt.Errorf("the output is %s", finished.GetOutput())
			}
			return err
		}
	}
	ahead := step("ahead", map[string]any{"image": dockerImage, "pull_policy": "never", "created_ahead": 1})
	if err := ahead(ctx); err != nil { // the first one has the second one's container created
		return err
	}
	spare := ""
	// Nothing is measured while a container is created ahead, and each that was is used.
	settle := func(ctx context.Context) error {
		now, err := e.spare(ctx)
		if err == nil && now == spare {
			err = errors.New("a container that was created ahead was not used")
		}
		spare = now
		return err
	}
	return s.inTurn(ctx,
		rival{name: "Engine API: create, attach, start, wait, remove", settle: settle, run: e.step},
		rival{name: "docker runner", run: step("ordinary", config)},
		rival{name: "docker runner, created_ahead: 1", run: ahead},
	)
}

// answer is what goes in and has to come out.
const answer = `{"answer":42}`

// dockerEngine speaks the Engine API with as little as it takes.
type dockerEngine struct {
	socket string
	http   *http.Client
}

func newDockerEngine() *dockerEngine {
	e := &dockerEngine{socket: "/var/run/docker.sock"}
	if path, ok := strings.CutPrefix(os.Getenv("DOCKER_HOST"), "unix://"); ok {
		e.socket = path
	}
	e.http = &http.Client{Transport: &http.Transport{DialContext: e.dial}}
	return e
}

func (e *dockerEngine) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", e.socket)
}

// call sends JSON, or a stream as it is, and reads JSON into answer.
func (e *dockerEngine) call(ctx context.Context, method, path string, body, answer any) error {
	content, ok := body.(io.Reader)
	kind := "application/x-tar"
	if body != nil && !ok {
		raw, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content, kind = bytes.NewReader(raw), "application/json"
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, content)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	resp, err := e.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	said, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, said)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(said, answer)
}

// image builds the program and imports it.
func (e *dockerEngine) image(ctx context.Context, dir string) error {
	source, program := filepath.Join(dir, "answer.go"), filepath.Join(dir, "answer")
	if err := os.WriteFile(source, []byte(answerProgram), 0o600); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, source) //nolint:gosec // our own
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the program of the image: %w\n%s", err, out)
	}
	content, err := os.ReadFile(program) //nolint:gosec // built here
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: "answer", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content))}); err != nil {
		return err
	}
	if _, err := w.Write(content); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	repo, tag, _ := strings.Cut(dockerImage, ":")
	query := url.Values{"fromSrc": {"-"}, "repo": {repo}, "tag": {tag}, "changes": {`ENTRYPOINT ["/answer"]`}}
	return e.call(ctx, http.MethodPost, "/images/create?"+query.Encode(), &archive, nil)
}

// spare waits for the container that was created ahead.
func (e *dockerEngine) spare(ctx context.Context) (string, error) {
	const patience = 10 * time.Second
	filters := url.Values{"all": {"1"}, "filters": {`{"label": ["dev.specql.created-ahead"], "status": ["created"]}`}}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("no container was created ahead in %s", patience))
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	seen := ""
	for {
		var found []struct{ ID string }
		if err := e.call(ctx, http.MethodGet, "/containers/json?"+filters.Encode(), nil, &found); err != nil {
			return "", cmp.Or(context.Cause(ctx), err)
		}
		if len(found) == 1 {
			if seen == found[0].ID { // twice: the runner has looked at it as well by now
				return seen, nil
			}
			seen = found[0].ID
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// container is the one that the runner makes of the same service, without what is the runner's own: a control
// group that measures, and the directory of output.json.
func (e *dockerEngine) container() map[string]any {
	return map[string]any{
		"Image": dockerImage, "Hostname": "job", "AttachStdin": true, "AttachStdout": true, "AttachStderr": true, "OpenStdin": true, "StdinOnce": true,
		"Env": []string{"SPECQL_INPUT=" + answer}, "Healthcheck": map[string]any{"Test": []string{"NONE"}},
		"HostConfig": map[string]any{
			"LogConfig": map[string]any{"Type": "none"}, "NetworkMode": "none", "CapDrop": []string{"ALL"}, "SecurityOpt": []string{"no-new-privileges:true"},
			"ReadonlyRootfs": true, "CgroupnsMode": "private", "IpcMode": "private", "ShmSize": 64 << 20, "OomScoreAdj": 500, "Init": true,
			"Tmpfs": map[string]string{"/tmp": "rw,nosuid,nodev,size=67108864,mode=1777,noexec"}, "Ulimits": []any{map[string]any{"Name": "core"}},
			"Memory": 64 << 20, "MemorySwap": 64 << 20, "NanoCpus": 1_000_000_000, "PidsLimit": 33, "OomKillDisable": false,
		},
	}
}

// step is what a container costs at least, by the engine alone.
func (e *dockerEngine) step(ctx context.Context) (err error) {
	var made struct{ ID string }
	if err := e.call(ctx, http.MethodPost, "/containers/create", e.container(), &made); err != nil {
		return err
	}
	at := "/containers/" + made.ID
	removed := false
	defer func() {
		if !removed {
			err = errors.Join(err, e.call(context.WithoutCancel(ctx), http.MethodDelete, at+"?force=1", nil, nil))
		}
	}()
	conn, output, err := e.attach(ctx, at)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	waited := make(chan error, 1)
	var status struct{ StatusCode int }
	go func() { waited <- e.call(ctx, http.MethodPost, at+"/wait?condition=next-exit", nil, &status) }()
	if err := e.call(ctx, http.MethodPost, at+"/start", nil, nil); err != nil {
		return err
	}
	if _, err := conn.Write([]byte(answer + "\n")); err != nil {
		return err
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	all, err := io.ReadAll(output)
	if err != nil {
		return err
	}
	if err := <-waited; err != nil {
		return err
	}
	const header = 8 // of a frame of the stream
	if len(all) < header || strings.TrimSpace(string(all[header:])) != answer || status.StatusCode != 0 {
		return fmt.Errorf("the container ended with status %d and wrote %q", status.StatusCode, all)
	}
	removed = true
	return e.call(ctx, http.MethodDelete, at+"?force=1&v=1", nil, nil)
}

// attach gives the container's streams.
func (e *dockerEngine) attach(ctx context.Context, at string) (*net.UnixConn, io.Reader, error) {
	plain, err := e.dial(ctx, "", "")
	if err != nil {
		return nil, nil, err
	}
	conn := plain.(*net.UnixConn) //nolint:forcetypeassert // it was dialled as one
	_, err = fmt.Fprintf(conn, "POST %s/attach?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n", at)
	output := bufio.NewReader(conn)
	if err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(output, nil); err == nil && resp.StatusCode != http.StatusSwitchingProtocols { //nolint:bodyclose // the connection itself goes on
			err = fmt.Errorf("attach: %s", resp.Status)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, output, nil
}

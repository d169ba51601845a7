package e2e

import (
	"bufio"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	network "github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// servicePrograms builds services once for all tests and gives the folder that they are in.
var servicePrograms = sync.OnceValues(func() (string, error) {
	dir, err := filepath.Abs(filepath.Join(root, ".cache", "bin"))
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "./services/http-runner", "./services/shell-runner", "./services/orchestrator")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the services: %w\n%s", err, out)
	}
	return dir, nil
})

// zone is a CA, and the folder with its certificates.
type zone struct {
	dir string
	ca  *x509.Certificate
	key *ecdsa.PrivateKey
}

func newZone(t *testing.T) *zone {
	t.Helper()
	authority, err := network.NewAuthority()
	require.NoError(t, err)
	z := &zone{dir: t.TempDir()}
	cert, key := authority.PEM()
	require.NoError(t, os.WriteFile(filepath.Join(z.dir, "ca.crt"), cert, 0o600))
	block, _ := pem.Decode(cert)
	z.ca, err = x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	block, _ = pem.Decode(key)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	require.NoError(t, err)
	z.key = parsed.(*ecdsa.PrivateKey)
	for _, role := range []string{"http-runner", "shell-runner", "orchestrator", "client"} {
		issued, err := authority.Issue(role)
		require.NoError(t, err)
		cert, key, _ := issued.PEM()
		require.NoError(t, os.WriteFile(filepath.Join(z.dir, role+".crt"), cert, 0o600))
		require.NoError(t, os.WriteFile(filepath.Join(z.dir, role+".key"), key, 0o600))
	}
	return z
}

// template is a certificate that says a role and holds now.
func template(role string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "specql", Path: "/" + role}}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
}

// signed makes a certificate; one without a parent signs itself.
func signed(t *testing.T, c, parent *x509.Certificate, by *ecdsa.PrivateKey) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// startRunner runs a runner with a ceiling until the end of the test and gives its address.
func (z *zone) startRunner(t *testing.T, name, ceiling string, env ...string) string {
	t.Helper()
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	require.NoError(t, os.WriteFile(policy, []byte(ceiling), 0o600))
	return z.startService(t, name, env, "--policy", policy).address
}

// service is one that runs in a process of its own.
type service struct {
	address string
	cmd     *exec.Cmd
	log     *lockedBuffer
	ended   chan struct{}
}

// stop ends the service and waits until it is gone.
func (s *service) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	<-s.ended
}

// startService runs a service with its certificate until the end of the test.
func (z *zone) startService(t *testing.T, name string, env []string, args ...string) *service {
	t.Helper()
	dir, err := servicePrograms()
	require.NoError(t, err)
	s := &service{log: &lockedBuffer{}, ended: make(chan struct{}), cmd: exec.Command(filepath.Join(dir, name), append([]string{
		"--listen", "127.0.0.1:0", "--log-format", "json",
		"--tls-cert", filepath.Join(z.dir, name+".crt"), "--tls-key", filepath.Join(z.dir, name+".key"), "--tls-ca", filepath.Join(z.dir, "ca.crt"),
	}, args...)...)}
	s.cmd.Env = environment(env...)
	stderr, err := s.cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, s.cmd.Start())
	ready := make(chan string, 1)
	go func() {
		defer close(s.ended)
		scan := bufio.NewScanner(stderr)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			_, _ = fmt.Fprintf(s.log, "%s\n", scan.Bytes())
			var entry struct{ Msg, Address, API string }
			if json.Unmarshal(scan.Bytes(), &entry) == nil && entry.Msg == "ready" {
				ready <- cmp.Or(entry.Address, entry.API)
			}
		}
		_ = s.cmd.Wait()
	}()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("%s:\n%s", name, s.log)
		}
	})
	select {
	case s.address = <-ready:
	case <-s.ended:
		require.Fail(t, name+" ended", "%s", s.log)
	case <-time.After(time.Minute):
		require.Fail(t, name+" is not ready after a minute")
	}
	return s
}

// call connects as an attacker does: who the server is is not looked at.
func call(t *testing.T, address string, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} //nolint:gosec // the attacker's
	if len(certificates) > 0 {
		// It is shown also where the server does not name its issuer.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificates[0], nil }
	}
	return callWith(t, address, credentials.NewTLS(config))
}

func callWith(t *testing.T, address string, transport credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(transport))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// everything calls all that a runner has, and gives what came of it by name.
func everything(t *testing.T, conn *grpc.ClientConn, job *runnerv1.Job) map[string]error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := runnerv1.NewRunnerServiceClient(conn)
	out := map[string]error{}
	_, out["Describe"] = c.Describe(ctx, &runnerv1.DescribeRequest{})
	_, out["Validate"] = c.Validate(ctx, &runnerv1.ValidateRequest{Service: job.GetService(), Operations: []*runnerv1.Operation{job.GetOperation()}})
	_, out["Check"] = c.Check(ctx, &runnerv1.CheckRequest{Service: job.GetService()})
	_, out["Limits"] = c.Limits(ctx, &runnerv1.LimitsRequest{Service: job.GetService(), Operation: job.GetOperation()})
	execute, err := c.Execute(ctx)
	if err == nil {
		_ = execute.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job}}) // Recv tells why not
		_, err = execute.Recv()
		for last := err; last == nil; { // the job ends with its stream
			_, last = execute.Recv()
		}
	}
	out["Execute"] = err
	reflection, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err == nil {
		_ = reflection.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
		_, err = reflection.Recv()
	}
	out["reflection"] = err
	return out
}

// Whoever is where the orchestrator is, and has not its certificate, gets nothing from a runner.
func TestTheOrchestratorsPlaceIsNotItsCertificate(t *testing.T) {
	var arrived atomic.Int64
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		arrived.Add(1)
		respond(w, http.StatusOK, map[string]any{})
	}))
	t.Cleanup(target.Close)
	z := newZone(t)
	marker := filepath.Join(t.TempDir(), "marker")
	jobs := map[string]*runnerv1.Job{
		"http-runner":  httpJob(target.URL, `["127.0.0.1"]`),
		"shell-runner": shellJob([]string{"/usr/bin/touch", marker}, `"/usr/bin/touch"`, filepath.Dir(marker)),
	}
	done := map[string]func() bool{
		"http-runner": func() bool { return arrived.Load() > 0 },
		"shell-runner": func() bool {
			_, err := os.Stat(marker)
			return err == nil
		},
	}
	other := newZone(t)
	expired, future, serverOnly, leaf := template("orchestrator"), template("orchestrator"), template("orchestrator"), template("client")
	expired.NotBefore, expired.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	future.NotBefore, future.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
	serverOnly.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	nameless := template("orchestrator")
	nameless.URIs = nil
	nameless.Subject.CommonName, nameless.DNSNames = "orchestrator", []string{"orchestrator"}
	parent := signed(t, leaf, z.ca, z.key)
	parsed, err := x509.ParseCertificate(parent.Certificate[0])
	require.NoError(t, err)
	byLeaf := signed(t, template("orchestrator"), parsed, parent.PrivateKey.(*ecdsa.PrivateKey))
	byLeaf.Certificate = append(byLeaf.Certificate, parent.Certificate[0])

	for name, ceiling := range map[string]string{
		"http-runner": "{allow_private_networks: true}", "shell-runner": "{allowed_commands: [/usr/bin/touch]}",
	} {
		address := z.startRunner(t, name, ceiling)
		job := jobs[name]
		for attempt, a := range map[string]struct {
			conn *grpc.ClientConn
			// ours: the certificate is of the CA, so that the runner tells who may call, and the health is open.
			ours bool
		}{
			"no certificate":                    {conn: call(t, address)},
			"plaintext":                         {conn: callWith(t, address, insecure.NewCredentials())},
			"self-signed":                       {conn: call(t, address, signed(t, template("orchestrator"), nil, nil))},
			"of another CA with the same name":  {conn: call(t, address, signed(t, template("orchestrator"), other.ca, other.key))},
			"expired":                           {conn: call(t, address, signed(t, expired, z.ca, z.key))},
			"not valid yet":                     {conn: call(t, address, signed(t, future, z.ca, z.key))},
			"for servers alone":                 {conn: call(t, address, signed(t, serverOnly, z.ca, z.key))},
			"signed by one that is no CA":       {conn: call(t, address, byLeaf)},
			"role http-runner":                  {conn: call(t, address, signed(t, template("http-runner"), z.ca, z.key)), ours: true},
			"role shell-runner":                 {conn: call(t, address, signed(t, template("shell-runner"), z.ca, z.key)), ours: true},
			"role client":                       {conn: call(t, address, signed(t, template("client"), z.ca, z.key)), ours: true},
			"role orchestrator-2":               {conn: call(t, address, signed(t, template("orchestrator-2"), z.ca, z.key)), ours: true},
			"no role, and the name of the host": {conn: call(t, address, signed(t, nameless, z.ca, z.key)), ours: true},
		} {
			for what, err := range everything(t, a.conn, job) {
				if !a.ours {
					require.Equal(t, codes.Unavailable, status.Code(err), "%s, %s, %s: %v", name, attempt, what, err)
					continue
				}
				require.Contains(t, []codes.Code{codes.PermissionDenied, codes.Unauthenticated}, status.Code(err), "%s, %s, %s: %v", name, attempt, what, err)
			}
			_, err := healthv1.NewHealthClient(a.conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
			require.Equal(t, a.ours, err == nil, "%s, %s: health: %v", name, attempt, err)
		}
		require.False(t, done[name](), "the job ran")
		// The same calls with the certificate.
		for what, err := range everything(t, call(t, address, signed(t, template("orchestrator"), z.ca, z.key)), job) {
			if name == "shell-runner" && what == "Limits" { // it has none
				require.Equal(t, codes.Unimplemented, status.Code(err))
				continue
			}
			require.NoError(t, err, "%s, %s", name, what)
		}
		require.True(t, done[name](), "%s: the job did not run", name)
	}
}

func httpJob(base, domains string) *runnerv1.Job {
	return &runnerv1.Job{
		Id: rand.Text(), RunId: "r", StepPath: "s", Attempt: 1, Epoch: 1, IdempotencyKey: rand.Text(), Input: []byte(`{}`),
		Service: &runnerv1.Service{
			Name: "service", ExecutionType: "http", RunnerConfig: fmt.Appendf(nil, `{"base_url": %q}`, base),
			SecurityPolicy: fmt.Appendf(nil, `{"allowed_domains": %s, "allow_private_networks": true}`, domains),
		},
		Operation: &runnerv1.Operation{Name: "work", Config: []byte(`{}`)},
	}
}

func shellJob(command []string, allowed, dir string) *runnerv1.Job {
	words, _ := json.Marshal(command)
	return &runnerv1.Job{
		Id: rand.Text(), RunId: "r", StepPath: "s", Attempt: 1, Epoch: 1, IdempotencyKey: rand.Text(), Input: []byte(`{}`),
		Service: &runnerv1.Service{
			Name: "service", ExecutionType: "shell", RunnerConfig: fmt.Appendf(nil, `{"working_directory": %q}`, dir),
			SecurityPolicy: fmt.Appendf(nil, `{"allowed_commands": [%s], "working_directory_restrictions": [%q]}`, allowed, dir),
		},
		Operation: &runnerv1.Operation{Name: "work", Config: fmt.Appendf(nil, `{"command": %s}`, words)},
	}
}

// Whoever has the orchestrator's certificate, and writes the registry's policy as wide as it likes, gets nothing beyond the ceiling.
func TestTheOrchestratorsCertificateDoesNotLiftTheCeiling(t *testing.T) {
	var beyond atomic.Int64
	lis, err := net.Listen("tcp", "127.0.0.2:0")
	require.NoError(t, err)
	outside := &httptest.Server{Listener: lis, Config: &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { beyond.Add(1) }), ReadHeaderTimeout: time.Minute}}
	outside.Start()
	t.Cleanup(outside.Close)
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away/work" {
			http.Redirect(w, r, outside.URL, http.StatusTemporaryRedirect)
			return
		}
		respond(w, http.StatusOK, map[string]any{"well": true})
	}))
	t.Cleanup(inside.Close)
	z := newZone(t)
	certificate := signed(t, template("orchestrator"), z.ca, z.key)
	execute := func(address string, job *runnerv1.Job) *runnertest.Outcome {
		return runnertest.Execute(t, runnerv1.NewRunnerServiceClient(call(t, address, certificate)), job)
	}

	address := z.startRunner(t, "http-runner", "{allowed_domains: [127.0.0.1], allow_private_networks: true, allowed_env_vars: [OPEN_*]}", "CLOSED_TOKEN=x", "OPEN_TOKEN=x")
	const wide = `["127.0.0.1", "127.0.0.2"]`
	require.Empty(t, execute(address, httpJob(inside.URL, wide)).Code(), "what both policies allow")
	require.Equal(t, "POLICY_VIOLATION", execute(address, httpJob(outside.URL, wide)).Code())
	require.Equal(t, "POLICY_VIOLATION", execute(address, httpJob(inside.URL+"/away", wide)).Code())
	for variable, code := range map[string]string{"OPEN_TOKEN": "", "CLOSED_TOKEN": "POLICY_VIOLATION"} {
		job := httpJob(inside.URL, wide)
		job.Service.RunnerConfig = fmt.Appendf(nil, `{"base_url": %q, "auth_type": "bearer", "auth_config": {"token_env_var": %q}}`, inside.URL, variable)
		require.Equal(t, code, execute(address, job).Code(), variable)
	}
	require.Zero(t, beyond.Load())

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o600))
	address = z.startRunner(t, "shell-runner", "{allowed_commands: [/usr/bin/touch]}")
	const both = `"/usr/bin/touch", "/usr/bin/rm"`
	require.Empty(t, execute(address, shellJob([]string{"/usr/bin/touch", "made"}, both, dir)).Code(), "what both policies allow")
	require.Equal(t, "POLICY_VIOLATION", execute(address, shellJob([]string{"/usr/bin/rm", "file"}, both, dir)).Code())
	require.FileExists(t, filepath.Join(dir, "file"))
}

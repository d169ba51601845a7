package e2e

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

// standins builds real counterparts of the cloud services and gives the folder that they are in.
func standins(t *testing.T) string {
	t.Helper()
	dir := absolute(t, root, ".cache", "standins")
	out, err := exec.Command(filepath.Join(root, "test", "standins", "build.sh"), dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return dir
}

// serve runs a server of others on a free port until the end of the test, and waits until it answers.
func serve(t *testing.T, env []string, program string, args func(address string) []string) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := lis.Addr().String()
	require.NoError(t, lis.Close())
	cmd := exec.Command(program, args(address)...)
	cmd.Env = append(os.Environ(), env...)
	log := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	require.Eventually(t, func() bool {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	}, 30*time.Second, 20*time.Millisecond, "%s does not listen\n%s", program, log)
	return "http://" + address
}

// googleKey is the key of a service account whose identity tokens come from a server of the test.
func googleKey(t *testing.T) string {
	t.Helper()
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ParseForm() != nil || strings.Count(r.PostForm.Get("assertion"), ".") != 2 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		claims := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp": %d}`, time.Now().Add(time.Hour).Unix()))
		respond(w, http.StatusOK, map[string]any{"id_token": "e30." + claims + ".c2lnbmF0dXJl", "token_type": "Bearer", "expires_in": 3600})
	}))
	t.Cleanup(tokens.Close)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	raw, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "specql-examples", "private_key_id": "test",
		"private_key":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"client_email": "test@specql-examples.iam.gserviceaccount.com", "client_id": "0", "token_uri": tokens.URL,
	})
	require.NoError(t, err)
	return string(raw)
}

// example runs an action of the examples and gives its run.
func example(t *testing.T, d *dev, a client.Action) *client.Run {
	t.Helper()
	run, err := d.ExecuteAndWait(t.Context(), a)
	require.NoError(t, err, "%s.%s", a.Entity, a.Action)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus())
	for _, j := range run.GetJobs() {
		require.Positive(t, j.GetResourceUsage().GetDurationSeconds(), "%s.%s", j.GetService(), j.GetOperation())
	}
	return run
}

func output(run *client.Run) map[string]any { return run.GetOutput().GetStructValue().AsMap() }

// The examples against real counterparts: Stripe's mock, an S3 server that checks signatures, a Lambda function of AWS's library, a
// function on Google's framework, an HTTP trigger with a function key.
func TestExamplesAgainstRealCounterparts(t *testing.T) {
	bin := standins(t)
	bucket := filepath.Join(t.TempDir(), "buckets", "specql-examples")
	require.NoError(t, os.MkdirAll(bucket, 0o750))
	const accessKey, secretKey = "AKIATEST", "a-secret-of-the-test"
	stripe := serve(t, nil, filepath.Join(bin, "stripe-mock"), func(a string) []string { return []string{"-http-addr", a} })
	s3 := serve(t, []string{"ROOT_ACCESS_KEY=" + accessKey, "ROOT_SECRET_KEY=" + secretKey}, filepath.Join(bin, "versitygw"),
		func(a string) []string { return []string{"--port", a, "posix", filepath.Dir(bucket)} })
	lambda := listening(t, filepath.Join(bin, "lambda-endpoint"), "-access-key", accessKey, "-secret-key", secretKey,
		"-function", "image-resize-service="+filepath.Join(bin, "lambda-resize")+",memory=1024,timeout=30")
	gcf := listening(t, filepath.Join(bin, "gcf-analysis"))
	azure := listening(t, filepath.Join(bin, "azure-notify"), "-key", "the-function-key")
	d := start(t, mesh{
		// The examples come out of the program, and are left alone in the checkout.
		env: []string{
			"SPECQL_EXAMPLES_STRIPE_URL=" + stripe, "STRIPE_API_KEY=sk_test_123",
			"SPECQL_EXAMPLES_S3_URL=" + s3, "AWS_ACCESS_KEY_ID=" + accessKey, "AWS_SECRET_ACCESS_KEY=" + secretKey,
			"SPECQL_EXAMPLES_LAMBDA_URL=" + lambda,
			"SPECQL_EXAMPLES_GCF_URL=" + gcf, "GOOGLE_SERVICE_ACCOUNT_KEY=" + googleKey(t),
			"SPECQL_EXAMPLES_AZURE_URL=" + azure, "AZURE_FUNCTION_KEY=the-function-key",
		},
	})

	t.Run("payment", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "payment", Action: "process_payment", Input: map[string]any{"amount_cents": 4200}})
		require.Contains(t, output(run)["charge_id"], "ch_")
		require.Equal(t, "paid", output(run)["status"])
		refund := example(t, d, client.Action{Entity: "payment", Action: "refund_payment", EntityID: run.GetEntityId()})
		require.Equal(t, "refunded", output(refund)["status"])
		require.Contains(t, output(refund)["refund_id"], "re_")
		_, err := d.ExecuteAndWait(t.Context(), client.Action{Entity: "payment", Action: "refund_payment", EntityID: run.GetEntityId()})
		require.ErrorContains(t, err, "precondition", "what is refunded is not refunded again")
	})
	t.Run("email", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "email", Action: "send_email"})
		require.Equal(t, "sent", output(run)["status"])
		require.NotEmpty(t, output(run)["message_id"])
	})
	t.Run("file", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "file", Action: "upload_file", Input: map[string]any{"object_key": "a b/c+d.txt", "content": "text of the file\n"}})
		require.NotEmpty(t, output(run)["etag"])
		require.Equal(t, "text of the file\n", read(t, bucket, "a b", "c+d.txt"))
		down := example(t, d, client.Action{Entity: "file", Action: "download_file", EntityID: run.GetEntityId()})
		require.Equal(t, "text of the file\n", output(down)["body"])
		example(t, d, client.Action{Entity: "file", Action: "delete_file", EntityID: run.GetEntityId()})
		require.NoFileExists(t, filepath.Join(bucket, "a b", "c+d.txt"))
	})
	t.Run("dataset", func(t *testing.T) {
		out := output(example(t, d, client.Action{Entity: "dataset", Action: "process_csv"}))
		require.InDelta(t, 12, out["rows_valid"], 0)
		require.InDelta(t, 4, out["rows_rejected"], 0)
		require.InDelta(t, 344672, out["total_cents"], 0)
		require.Len(t, out["groups"], 4)
	})
	t.Run("image", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "image", Action: "resize_image", Input: map[string]any{"target_width": 30, "target_height": 20}})
		require.InDelta(t, 30, output(run)["width"], 0)
		picture, err := base64.StdEncoding.DecodeString(job(t, run, "image_processor").GetOutput().GetStructValue().AsMap()["image_base64"].(string))
		require.NoError(t, err)
		require.Equal(t, "image/png", http.DetectContentType(picture))
	})
	t.Run("report", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "report", Action: "generate_pdf"})
		require.InDelta(t, 1, output(run)["pages"], 0)
		raw, err := base64.StdEncoding.DecodeString(job(t, run, "report_generator").GetOutput().GetStructValue().AsMap()["pdf_base64"].(string))
		require.NoError(t, err)
		require.Equal(t, "application/pdf", http.DetectContentType(raw))
		require.InDelta(t, len(raw), output(run)["bytes"], 0)
	})
	t.Run("thumbnail", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "thumbnail", Action: "resize"})
		require.Positive(t, output(run)["new_size"])
		usage := job(t, run, "image_resizer").GetResourceUsage()
		require.Positive(t, usage.GetBilledDurationMs())
		require.Positive(t, usage.GetPeakMemoryMb())
		require.Positive(t, usage.GetCostUsd())
	})
	t.Run("analysis", func(t *testing.T) {
		out := output(example(t, d, client.Action{Entity: "analysis", Action: "analyze", Input: map[string]any{"numbers": []any{1, 2, 3, 10}}}))
		require.InDelta(t, 4, out["count"], 0)
		require.InDelta(t, 4, out["mean"], 1e-9)
		require.InDelta(t, 2.5, out["median"], 1e-9)
	})
	t.Run("notification", func(t *testing.T) {
		run := example(t, d, client.Action{Entity: "notification", Action: "send_notification"})
		require.Equal(t, "queued", output(run)["status"])
		require.NotEmpty(t, output(run)["notification_id"])
	})
	t.Run("containers", func(t *testing.T) {
		engine(t)
		require.Equal(t, "landscape", output(example(t, d, client.Action{Entity: "prediction", Action: "classify_image"}))["label"])
		video := output(example(t, d, client.Action{Entity: "video", Action: "transcode_video"}))
		require.InDelta(t, 3, video["frames"], 0)
		require.InDelta(t, 16, video["width"], 0)
		run := example(t, d, client.Action{Entity: "document", Action: "convert_document"})
		page, err := base64.StdEncoding.DecodeString(job(t, run, "document_converter").GetOutput().GetStructValue().AsMap()["document_base64"].(string))
		require.NoError(t, err)
		require.Contains(t, string(page), "<h1>Terms of delivery</h1>")
		require.Contains(t, string(page), "<strong>within two days</strong>")
	})
	t.Run("no secret is told", func(t *testing.T) {
		runs, _, err := d.List(t.Context(), &specqlv1.ListRunsRequest{})
		require.NoError(t, err)
		require.NotEmpty(t, runs)
		for _, r := range runs {
			full, err := d.Get(t.Context(), r.GetId())
			require.NoError(t, err)
			for _, secret := range []string{"sk_test_123", secretKey, "the-function-key", "PRIVATE KEY"} {
				require.NotContains(t, full.String(), secret)
			}
		}
		for _, secret := range []string{"sk_test_123", secretKey, "the-function-key", "PRIVATE KEY"} {
			require.NotContains(t, d.log.String(), secret)
		}
	})
}

// The steps and the three commands of the examples' README, as they are written there, without credentials.
func TestCommandsOfTheReadme(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "registry"), 0o750))
	registry := read(t, root, "examples", "multi-execution", "registry", "service_registry.yaml")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"), []byte(registry), 0o600))
	env := []string{"STRIPE_API_KEY=sk_test_...", "SENDGRID_API_KEY=SG...."}
	d := start(t, mesh{dir: dir, env: env})
	env = append(env, "SPECQL_ADDRESS="+d.api)
	type result struct {
		Status string         `json:"status"`
		Output map[string]any `json:"output"`
		Jobs   []struct {
			ExecutionType string         `json:"executionType"`
			ResourceUsage map[string]any `json:"resourceUsage"`
		} `json:"jobs"`
	}
	for _, c := range []struct{ entity, action, kind string }{
		{"payment", "process_payment", "http"},
		{"report", "generate_pdf", "shell"},
		{"prediction", "classify_image", "docker"},
	} {
		t.Run(c.entity, func(t *testing.T) {
			if c.kind == "docker" {
				engine(t)
			}
			status, out, errs := run(t, dir, env, "execute-job", "--entity", c.entity, "--action", c.action)
			require.Zero(t, status, "%s%s", out, errs)
			status, out, errs = run(t, dir, env, "execute-job", "--entity", c.entity, "--action", c.action, "-o", "json")
			require.Zero(t, status, "%s%s", out, errs)
			var got result
			require.NoError(t, json.Unmarshal([]byte(out), &got), out)
			require.Equal(t, "completed", got.Status)
			require.NotEmpty(t, got.Output)
			require.Len(t, got.Jobs, 1)
			require.Equal(t, c.kind, got.Jobs[0].ExecutionType)
			require.NotEmpty(t, got.Jobs[0].ResourceUsage)
		})
	}
}

// The demo ends by itself, with what each step used.
func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, specql(t), "demo", "-o", "json")
	cmd.Dir, cmd.Env = t.TempDir(), environment()
	errs := &lockedBuffer{}
	cmd.Stderr = errs
	out, err := cmd.Output()
	require.NoError(t, err, "%s", errs)
	var got struct {
		Status string `json:"status"`
		Jobs   []struct {
			Service       string `json:"service"`
			ExecutionType string `json:"executionType"`
			Status        string `json:"status"`
		} `json:"jobs"`
	}
	require.NoError(t, json.Unmarshal(out, &got), "%s", out)
	require.Equal(t, "completed", got.Status)
	statuses := map[string][]string{}
	kinds := map[string]bool{}
	for _, j := range got.Jobs {
		statuses[j.Service] = append(statuses[j.Service], j.Status)
		kinds[j.ExecutionType] = true
	}
	require.Equal(t, []string{"failed", "completed"}, statuses["stripe"], "the fallback really happened")
	require.Subset(t, kinds, map[string]bool{"http": true, "shell": true, "serverless": true})
	require.Equal(t, []string{"completed"}, statuses["report_generator"], "the condition held")
	if !strings.Contains(errs.String(), "Docker is skipped") {
		require.Equal(t, []string{"completed"}, statuses["ml_predictor"])
	}
	left, err := os.ReadDir(cmd.Dir)
	require.NoError(t, err)
	require.Empty(t, left, "nothing is left behind")
}

package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// withServices starts a mesh with the test registry in front of a recording server.
func withServices(t *testing.T) (*dev, *recorder) {
	t.Helper()
	r := newRecorder(t)
	return start(t, services(t, r)), r
}

func services(t *testing.T, r *recorder) mesh {
	t.Helper()
	// A script sees the files of its working directory and no others, so that a test puts its own there.
	scripts := t.TempDir()
	require.NoError(t, os.CopyFS(scripts, os.DirFS(absolute(t, "testdata", "scripts"))))
	return mesh{
		args:    []string{"--registry", absolute(t, "testdata", "registry.yaml")},
		env:     []string{"SPECQL_TEST_URL=" + r.URL, "SPECQL_TEST_SCRIPTS=" + scripts},
		scripts: scripts,
	}
}

// snippet is a workflow of the user's documents, unchanged.
func snippet(t *testing.T, name string) string {
	t.Helper()
	return read(t, "testdata", "seeds", name+".yaml")
}

// jobs are a run's calls as service.operation, in the order in which they were started.
func jobs(r *client.Run) []string {
	names := []string{}
	for _, j := range r.GetJobs() {
		names = append(names, j.GetService()+"."+j.GetOperation())
	}
	return names
}

func job(t *testing.T, r *client.Run, service string) *client.Job {
	t.Helper()
	for _, j := range r.GetJobs() {
		if j.GetService() == service {
			return j
		}
	}
	require.Fail(t, "no job", "of %s among %v", service, jobs(r))
	return nil
}

func TestSeedWorkflows(t *testing.T) {
	r := newRecorder(t)
	m := services(t, r)
	d := start(t, m)
	execute := func(t *testing.T, name string, input map[string]any) *client.Run {
		t.Helper()
		run, err := d.ExecuteAndWait(t.Context(), client.Action{Workflow: snippet(t, name), Input: input})
		require.NoError(t, err)
		require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus())
		return run
	}

	t.Run("error handling: a failed charge sends an alert, and the run goes on", func(t *testing.T) {
		order := map[string]any{"id": "ord-7", "total": 4200}
		r.says("payment_processor.charge_card", http.StatusPaymentRequired, map[string]any{"error": "declined"})
		run := execute(t, "workflow_error_handling", map[string]any{"order": order})
		require.Equal(t, []string{"payment_processor.charge_card", "notification_service.send_alert"}, jobs(run))
		require.Equal(t, map[string]any{"amount": 4200.0}, r.of("payment_processor.charge_card")[0].body)
		require.Equal(t, "Payment failed for order ord-7", r.of("notification_service.send_alert")[0].body["message"])
		require.Equal(t, specqlv1.Status_STATUS_FAILED, job(t, run, "payment_processor").GetStatus())

		r.says("payment_processor.charge_card", http.StatusOK, map[string]any{})
		run = execute(t, "workflow_error_handling", map[string]any{"order": order})
		require.Equal(t, []string{"payment_processor.charge_card"}, jobs(run))
	})

	t.Run("sequential: each step works on what the one before gave", func(t *testing.T) {
		records := []any{map[string]any{"value": 1.0}, map[string]any{"value": 20.0}}
		r.says("data_validator.validate", http.StatusOK, map[string]any{"result": map[string]any{"records": records}})
		run := execute(t, "workflow_sequential", map[string]any{"raw_data": "1;20"})
		require.Equal(t, []string{"data_validator.validate", "data_processor.transform", "data_storage.save"}, jobs(run))
		require.Equal(t, map[string]any{"data": "1;20"}, r.of("data_validator.validate")[0].body)
		doubled := map[string]any{"records": []any{map[string]any{"value": 2.0}, map[string]any{"value": 40.0}}}
		require.Equal(t, map[string]any{"data": doubled}, r.of("data_storage.save")[0].body)
	})

	t.Run("parallel: the three calls are under way at the same time", func(t *testing.T) {
		names := []string{"email_service.send_receipt", "inventory_service.update_stock", "analytics_service.track_purchase"}
		var arrived sync.WaitGroup
		arrived.Add(len(names))
		all := make(chan struct{})
		go func() { arrived.Wait(); close(all) }()
		for _, name := range names {
			r.on(name, func(w http.ResponseWriter, req *http.Request, _ request) {
				arrived.Done()
				select { // nobody is answered before everybody is there
				case <-all:
					respond(w, http.StatusOK, map[string]any{})
				case <-req.Context().Done():
				}
			})
		}
		items := []any{map[string]any{"sku": "a", "count": 2.0}}
		order := map[string]any{"id": "ord-8", "items": items}
		run := execute(t, "workflow_parallel", map[string]any{"order": order})
		require.ElementsMatch(t, names, jobs(run))
		require.Equal(t, map[string]any{"order": order}, r.of(names[0])[0].body)
		require.Equal(t, map[string]any{"items": items}, r.of(names[1])[0].body)
		require.Equal(t, map[string]any{"order": order}, r.of(names[2])[0].body)
	})

	t.Run("http and shell: the old call works, and so does the new one", func(t *testing.T) {
		r.says("stripe_api.create_charge", http.StatusOK, map[string]any{"id": "ch_1"})
		in, out := filepath.Join(m.scripts, "in.csv"), filepath.Join(m.scripts, "out.txt")
		require.NoError(t, os.WriteFile(in, []byte("a\nb\nc\n"), 0o600))
		run := execute(t, "workflow_http_and_shell", map[string]any{
			"order": map[string]any{"total": 990}, "upload": map[string]any{"path": in}, "result": map[string]any{"path": out},
		})
		require.Equal(t, []string{"stripe_api.create_charge", "data_processor.process_data"}, jobs(run))
		require.Equal(t, map[string]any{"amount": 990.0}, r.of("stripe_api.create_charge")[0].body)
		require.Equal(t, "3\n", read(t, out))
		processed := job(t, run, "data_processor")
		require.Equal(t, "shell", processed.GetExecutionType())
		require.Equal(t, map[string]any{"status": "done", "records_processed": 3.0}, processed.GetOutput().AsInterface())
		require.Positive(t, processed.GetResourceUsage().GetDurationSeconds())
	})

	t.Run("conditional: a GPU where it is asked for, else a CPU", func(t *testing.T) {
		require.Equal(t, []string{"gpu_processor.process"}, jobs(execute(t, "workflow_conditional", map[string]any{"use_gpu": true})))
		require.Equal(t, []string{"cpu_processor.process"}, jobs(execute(t, "workflow_conditional", map[string]any{"use_gpu": false})))
	})

	t.Run("fallback: the second service takes over", func(t *testing.T) {
		r.says("primary_api.process", http.StatusServiceUnavailable, map[string]any{})
		run := execute(t, "workflow_fallback", map[string]any{"data": "abc"})
		require.Equal(t, []string{"primary_api.process", "backup_api.process"}, jobs(run))
		require.Equal(t, map[string]any{"data": "abc"}, r.of("backup_api.process")[0].body)
		primary := r.of("primary_api.process")
		require.Len(t, primary, 2, "one retry")
		require.NotEmpty(t, primary[0].header.Get("Idempotency-Key"))
		require.Equal(t, primary[0].header.Get("Idempotency-Key"), primary[1].header.Get("Idempotency-Key"))
		require.NotEqual(t, primary[0].header.Get("Idempotency-Key"), r.of("backup_api.process")[0].header.Get("Idempotency-Key"))

		r.says("backup_api.process", http.StatusBadRequest, map[string]any{})
		run, err := d.ExecuteAndWait(t.Context(), client.Action{Workflow: snippet(t, "workflow_fallback"), Input: map[string]any{"data": "abc"}})
		require.Error(t, err, "a failure inside on_failure fails the run")
		require.Equal(t, specqlv1.Status_STATUS_FAILED, run.GetStatus())
		require.Equal(t, fault.RemoteError, fault.From(err).Code)
	})

	t.Run("multi step: http, then shell, then a container", func(t *testing.T) {
		image(t, "specql/e2e", "local", "testdata/analyze")
		r.says("api_service.fetch_data", http.StatusOK, map[string]any{"data": []any{map[string]any{"value": 3.5}, map[string]any{"value": 4.0}}})
		run := execute(t, "workflow_multi_step", map[string]any{"request": map[string]any{"query": "all"}})
		require.Equal(t, []string{"api_service.fetch_data", "data_processor.transform", "ml_processor.analyze"}, jobs(run))
		require.Equal(t, map[string]any{"query": "all"}, r.of("api_service.fetch_data")[0].body)
		analyzed := job(t, run, "ml_processor")
		require.Equal(t, "docker", analyzed.GetExecutionType())
		require.Equal(t, map[string]any{"records": 2.0, "sum": 15.0}, analyzed.GetOutput().AsInterface())
	})
}

// A workflow that refers to what is not there fails before anything is called.
func TestUnknownReferenceCallsNothing(t *testing.T) {
	d, r := withServices(t)
	_, err := d.ExecuteAndWait(t.Context(), client.Action{Workflow: snippet(t, "workflow_error_handling"), Input: map[string]any{"oder": 1}})
	require.ErrorContains(t, err, "order")
	require.Equal(t, fault.Validation, fault.From(err).Code)
	require.Empty(t, r.calls())
}

// Every attempt of a call is over within the time that the workflow gives it.
func TestTimeoutEndsACall(t *testing.T) {
	d, r := withServices(t)
	gone := make(chan struct{}, 1)
	r.on("worker.work", func(_ http.ResponseWriter, req *http.Request, _ request) {
		<-req.Context().Done()
		gone <- struct{}{}
	})
	_, err := d.ExecuteAndWait(t.Context(), client.Action{Workflow: `
actions:
  - call_service: {service: worker, operation: work, input: {n: 1}, timeout: 0.2, max_retries: 0}
`})
	require.Equal(t, fault.Timeout, fault.From(err).Code, "%v", err)
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		require.Fail(t, "the call goes on")
	}
}

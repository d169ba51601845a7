package kubernetes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

func transcriptOf() (*transcript, *sink) {
	s := &sink{}
	return &transcript{a: &attempt{r: &Runner{log: slog.New(slog.DiscardHandler)}, sink: s}, capture: dockerrunner.NewCapture(s)}, s
}

// TestBrokenLogs: a connection that breaks is made anew and begins at the beginning; nothing is
// taken twice, and what is missing is noticed.
func TestBrokenLogs(t *testing.T) {
	t.Parallel()
	tr, s := transcriptOf()
	require.NoError(t, tr.take(strings.NewReader("0Oone\nnot a frame\n1otw\n")))
	require.NoError(t, tr.take(strings.NewReader("0Oone\n1otw\n2Oo\n3F{\"a\":\n4f1}\n5U{\"cpu\":0.5,\"s\":1}\n6R{\"exit\":3,\"usage\":{\"cpu\":0.7,\"s\":2}}\n7Oafter the end\n")))
	require.Equal(t, []string{"stdout: one", "stdout: two"}, s.lines)
	require.Equal(t, "{\"a\":\n1}", string(tr.file))
	require.Equal(t, 3, tr.report.ExitCode)
	require.InDelta(t, 0.7, *tr.report.Usage.CPUSeconds, 0)
	require.False(t, tr.gap)

	tr, _ = transcriptOf()
	require.NoError(t, tr.take(strings.NewReader("5Olate\n6R{\"exit\":0}\n")))
	require.True(t, tr.gap, "a node that kept too little of its logs")

	tr, _ = transcriptOf()
	require.Error(t, tr.take(strings.NewReader("0R{\n")))
}

// failing is an API server that answers everything in one way.
func failing(t *testing.T, code int, reason metav1.StatusReason, message string) *Runner {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message, //nolint:gosec // a status
		})
	}))
	t.Cleanup(server.Close)
	return connected(t, server.URL)
}

func connected(t *testing.T, address string) *Runner {
	t.Helper()
	r, err := New(Options{Config: &rest.Config{Host: address}, Namespace: "jobs", ShimImage: "specql/docker-runner:1"})
	require.NoError(t, err, "a runner starts whatever the API server does")
	t.Cleanup(r.Close)
	return r
}

func TestAPIFaults(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status     int
		reason     metav1.StatusReason
		message    string
		code, says string
	}{
		"no right":       {403, metav1.StatusReasonForbidden, `jobs.batch is forbidden: User "x" cannot list`, "UNAVAILABLE", "the Role of the chart"},
		"no token":       {401, metav1.StatusReasonUnauthorized, "Unauthorized", "UNAVAILABLE", "the Role of the chart"},
		"a quota":        {403, metav1.StatusReasonForbidden, "exceeded quota: jobs", "UNAVAILABLE", "quota of the namespace jobs"},
		"no namespace":   {404, metav1.StatusReasonNotFound, `namespaces "jobs" not found`, "UNAVAILABLE", "no namespace jobs"},
		"what is no Job": {422, metav1.StatusReasonInvalid, "spec.template: Invalid value", "VALIDATION", "does not take the Job"},
		"too many calls": {429, metav1.StatusReasonTooManyRequests, "slow down", "UNAVAILABLE", "could not list Jobs"},
		"in trouble":     {500, metav1.StatusReasonInternalError, "etcd is away", "UNAVAILABLE", "etcd is away"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := failing(t, c.status, c.reason, c.message).Ping(t.Context())
			require.Error(t, err)
			require.Equal(t, c.code, string(fault.From(err).Code), "%v", err)
			require.ErrorContains(t, err, c.says)
		})
	}
}

// TestNoAPI: a call fails within its time, as one to be tried again, and says what to look at.
func TestNoAPI(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(nil)
	server.Close()
	r := connected(t, server.URL)
	d, err := r.Describe(t.Context())
	require.NoError(t, err)
	require.Equal(t, "kubernetes_api", d.Isolation[0].Name)
	require.False(t, d.Isolation[0].Available)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(fault.New(fault.Cancelled, "not wanted any more"))
	res, err := r.Execute(ctx, jobOf(t, nil, nil), &sink{})
	require.NoError(t, err)
	require.Equal(t, fault.Cancelled, fault.From(res.Err).Code)
	require.Equal(t, "kubernetes", res.Usage.GetSource())
	require.Nil(t, res.Usage.CpuSeconds, "what was not measured is absent") //nolint:protogetter // absent is not zero
	require.ErrorContains(t, r.Ping(t.Context()), "does not answer")
}

// TestLastWords: the report is believed where it is the shim's, and memory is told by the kubelet, too.
func TestLastWords(t *testing.T) {
	t.Parallel()
	p, err := dockerrunner.Prepare(jobOf(t, nil, object{"resource_limits": object{"memory_mb": 64}}), nil, &runner.Checks{})
	require.NoError(t, err)
	// A Job of before has no key, and nobody's words are believed.
	_, err = shim.ParseWords([]byte(`{"exit":0}`), "")
	require.Error(t, err)
	for name, c := range map[string]struct {
		reason, words string
		code          int32
		report        *shim.Report
		want, says    string
	}{
		"done":                     {"Completed", "", 0, &shim.Report{}, "", ""},
		"the log is gone":          {"Error", `{"exit":3,"key":"k3y"}`, 3, nil, "REMOTE_ERROR", "status 3"},
		"words of the program":     {"Error", `{"exit":137,"oom":true,"usage":{"cpu":99}}`, 137, nil, "UNAVAILABLE", "without the shim's report"},
		"with a key that it made":  {"Error", `{"exit":2,"key":"key","usage":{"cpu":99}}`, 2, nil, "UNAVAILABLE", "without the shim's report"},
		"words that are not so":    {"Error", `{"exit":0,"key":"k3y"}`, 3, nil, "UNAVAILABLE", "without the shim's report"},
		"no words at all":          {"Error", "", 2, nil, "UNAVAILABLE", "without the shim's report"},
		"killed with its shim":     {"OOMKilled", `{"exit":0,"usage":{"cpu":99}}`, 137, nil, "RESOURCE_EXCEEDED", "its limit is 64 MiB"},
		"a part of it was killed":  {"Error", "", 137, &shim.Report{ExitCode: 137, OOM: true}, "RESOURCE_EXCEEDED", "its limit is 64 MiB"},
		"killed without a trace":   {"Error", "", 137, &shim.Report{ExitCode: 137}, "REMOTE_ERROR", "signal 9"},
		"told to end":              {"Error", "", 137, &shim.Report{ExitCode: 137, Ended: true}, "UNAVAILABLE", "before its program had ended"},
		"a program that is not so": {"Error", "", 125, &shim.Report{ExitCode: 125, Start: "there is no program"}, "VALIDATION", "no program"},
	} {
		tr, _ := transcriptOf()
		tr.report = c.report
		a := tr.a
		a.p, a.key, a.checks = p, "k3y", &runner.Checks{}
		read := make(chan error, 1)
		read <- nil
		s := look(t.Context(), podThatEnded(c.reason, c.words, c.code), p)
		_, err := a.result(t.Context(), &s, tr, read)
		if c.want == "" {
			require.NoError(t, err, name)
			continue
		}
		require.Error(t, err, name)
		require.Equal(t, c.want, string(fault.From(err).Code), "%s: %v", name, err)
		require.ErrorContains(t, err, c.says, name)
		if a.usage != nil {
			require.Nil(t, a.usage.CPUSeconds, "%s: figures of nobody", name)
		}
	}
}

// answers is an API server without a network: what it says to each GET by the end of the path.
type answers map[string]any

func (a answers) RoundTrip(req *http.Request) (*http.Response, error) {
	code, body := http.StatusNotFound, any(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound,
	})
	if found, ok := a[path.Base(req.URL.Path)]; ok {
		code, body = http.StatusOK, found
	}
	text, err := json.Marshal(body)
	return &http.Response{
		StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(text)), Request: req,
	}, err
}

// TestNoPodComes: a call does not wait for its deadline where its Job was taken away, or has ended with a pod that is gone.
func TestNoPodComes(t *testing.T) {
	t.Parallel()
	ended := func(uid string) *batchv1.Job {
		return &batchv1.Job{
			TypeMeta: metav1.TypeMeta{Kind: "Job", APIVersion: "batch/v1"}, ObjectMeta: metav1.ObjectMeta{Name: "specql-1", UID: types.UID(uid)},
			Status: batchv1.JobStatus{Conditions: []batchv1.JobCondition{{Type: batchv1.JobFailed, Status: corev1.ConditionTrue, Message: "BackoffLimitExceeded"}}},
		}
	}
	list := func(pods ...corev1.Pod) *corev1.PodList {
		return &corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: pods}
	}
	for name, c := range map[string]struct {
		api  answers
		says string
	}{
		"taken away":                           {answers{}, "took the Job specql-1 away"},
		"another of its name":                  {answers{"specql-1": ended("2")}, "took the Job specql-1 away"},
		"ended, and its pod is gone":           {answers{"specql-1": ended("1"), "pods": list()}, "BackoffLimitExceeded"},
		"ended, and its pod is to be seen yet": {answers{"specql-1": ended("1"), "pods": list(corev1.Pod{})}, "the time is over"},
		"not ended":                            {answers{"specql-1": &batchv1.Job{TypeMeta: metav1.TypeMeta{Kind: "Job", APIVersion: "batch/v1"}, ObjectMeta: metav1.ObjectMeta{UID: "1"}}}, "the time is over"},
	} {
		synctest.Test(t, func(t *testing.T) {
			api, err := newAPI(&rest.Config{Host: "https://cluster.example.org", Transport: c.api}, "jobs")
			require.NoError(t, err)
			r := &Runner{o: Options{Namespace: "jobs"}, api: api, log: slog.New(slog.DiscardHandler)}
			r.pods, err = r.newInformer()
			require.NoError(t, err)
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Hour, errors.New("the time is over"))
			defer cancel()
			s := &sink{}
			_, err = (&attempt{r: r, name: "specql-1", uid: "1", sink: s}).follow(ctx, nil)
			require.ErrorContains(t, err, c.says, name)
			require.LessOrEqual(t, len(s.lines), 1, "%s: it is said once", name)
		})
	}
}

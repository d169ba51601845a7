package runnertest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh/rpcfuzz"
	"github.com/specql/mesh/pkg/runner"
)

// Fuzz sends hostile requests to all methods of a runner over a real connection. The jobs are what a fuzzer makes of
// the given ones: the runner's ceiling has to hold them to what is harmless.
func Fuzz(f *testing.F, jr runner.JobRunner, jobs ...*runnerv1.Job) {
	f.Helper()
	conn := Connect(f, jr, runner.Options{MaxConcurrency: 4, DrainTimeout: time.Millisecond})
	seeds := map[string][][]proto.Message{
		"Describe": {{&runnerv1.DescribeRequest{}}},
		"Execute":  {{&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{}}}}},
	}
	for i, job := range jobs {
		job.Id, job.Attempt, job.Epoch = fmt.Sprintf("fuzz-%d", i), 1, 1
		job.Timeout = durationpb.New(200 * time.Millisecond)
		start := &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job}}
		for _, next := range []*runnerv1.ExecuteRequest{
			{Command: &runnerv1.ExecuteRequest_Renew{Renew: &runnerv1.Renew{}}},
			{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{}}},
			start,
		} {
			seeds["Execute"] = append(seeds["Execute"], []proto.Message{start, next})
		}
		seeds["Validate"] = append(seeds["Validate"], []proto.Message{&runnerv1.ValidateRequest{
			Service: job.GetService(), Operations: []*runnerv1.Operation{job.GetOperation()},
		}})
	}
	rpcfuzz.Service(f, conn, runnerv1.File_specql_runner_v1_runner_proto.Services().ByName("RunnerService"), rpcfuzz.Options{
		Seeds: seeds, Check: checkAnswer,
		// Not every runner has all methods.
		Allow: func(method string, err error) bool {
			return (method == "Limits" || method == "Check") && strings.Contains(err.Error(), "this runner ")
		},
	})
}

// checkAnswer holds what a runner says to its contract.
func checkAnswer(method string, response []byte) error {
	if method != "Execute" {
		return nil
	}
	var answer runnerv1.ExecuteResponse
	if err := proto.Unmarshal(response, &answer); err != nil {
		return err
	}
	finished := answer.GetFinished()
	if finished == nil {
		return nil
	}
	if out := finished.GetOutput(); len(out) > 0 && !json.Valid(out) {
		return fmt.Errorf("the output is not JSON: %q", out)
	}
	if e := finished.GetError(); e != nil {
		if !slices.Contains(fault.Codes(), fault.Code(e.GetCode())) || fault.Code(e.GetCode()) == fault.Internal {
			return fmt.Errorf("the job fails with %s: %s", e.GetCode(), e.GetMessage())
		}
	}
	return nil
}

// Quiet is a sink that hears what a job says, and keeps none of it.
type Quiet struct{}

// Log implements runner.Sink.
func (Quiet) Log(string, string) {}

// Usage implements runner.Sink.
func (Quiet) Usage(*runnerv1.ResourceUsage) {}

// Secret implements runner.Sink.
func (Quiet) Secret(string) {}

// Answering is the address of a server that answers what it is told, whatever it is asked.
func Answering(f *testing.F, answer *atomic.Pointer[[]byte]) string {
	f.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(f, err)
	f.Cleanup(func() { _ = lis.Close() })
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
					_, _ = conn.Write(*answer.Load())
				}
			}()
		}
	}()
	return lis.Addr().String()
}

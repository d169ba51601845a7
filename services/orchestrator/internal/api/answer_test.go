package api

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// An answer is no larger than a client takes, whatever a run holds: numbers are where a message is longest beside its JSON.
func TestTheAnswerOfARunIsBounded(t *testing.T) {
	t.Parallel()
	large := json.RawMessage(`{"n":[1` + strings.Repeat(",1", (4<<20-20)/2) + `]}`)
	small := json.RawMessage(`{"n":1}`)
	run := &store.Run{ID: "r", Status: store.Completed, Input: large, Output: large}
	out := fullProto(run, []*store.Job{
		{ID: "first", Input: small, Output: small}, {ID: "large", Input: large, Output: large}, {ID: "last", Input: small, Output: small},
	})
	require.Less(t, proto.Size(out), client.MaxMessageBytes)
	require.NotNil(t, out.GetOutput())
	for i, omitted := range []bool{false, true, false} {
		job := out.GetJobs()[i]
		require.Equal(t, omitted, job.GetPayloadsOmitted(), job.GetId())
		require.Equal(t, omitted, job.GetInput() == nil, job.GetId())
	}
}

// A run of as many jobs as there may be has an answer, with what became of each, however much they have to say.
func TestTheAnswerOfManyJobsIsBounded(t *testing.T) {
	t.Parallel()
	failed := &store.Job{
		ID: "00000000-0000-4000-8000-000000000001", RunID: "00000000-0000-4000-8000-000000000002", StepPath: "steps[0].do[99999].steps[0]", Service: "service", Operation: "operation",
		ExecutionType: "shell", Status: store.Failed, Attempts: 1, CreatedAt: time.Now(), StartedAt: time.Now(), CompletedAt: time.Now(),
		IdempotencyKey:  "00000000-0000-4000-8000-000000000002/steps[0].do[99999].steps[0]#0",
		ResourceUsage:   json.RawMessage(`{"durationSeconds":0.2}`),
		SecurityContext: json.RawMessage(`{"policyDigest":"` + strings.Repeat("d", 64) + `"}`),
		Err:             &fault.Error{Code: fault.RemoteError, Message: strings.Repeat("ä", 8<<10)},
	}
	out := fullProto(&store.Run{ID: "r", Status: store.Failed}, slices.Repeat([]*store.Job{failed}, engine.MaxJobs))
	require.Less(t, proto.Size(out), client.MaxMessageBytes)
	require.Len(t, out.GetJobs(), engine.MaxJobs)
	first, last := out.GetJobs()[0], out.GetJobs()[engine.MaxJobs-1]
	require.Equal(t, failed.Err.Message, first.GetError().GetMessage())
	require.False(t, first.GetPayloadsOmitted())
	require.NotNil(t, first.GetSecurityContext())
	require.True(t, last.GetPayloadsOmitted())
	require.Equal(t, strings.Repeat("ä", leastMessage/2)+"…", last.GetError().GetMessage())
	require.Equal(t, specqlv1.Status_STATUS_FAILED, last.GetStatus())
}

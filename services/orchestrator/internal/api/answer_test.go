package api

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/specql/mesh/pkg/client"
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

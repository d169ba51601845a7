package api_test

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/api"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const registryText = `
services:
  - name: bank
    type: t
    category: c
    operations: [{name: charge}]
`

// A workflow below the size that is taken can hold thousands of mistakes. The answer, which
// travels in the trailers of the response, says a hundred of them at most.
func TestThousandsOfMistakesGiveOneBoundedAnswer(t *testing.T) {
	t.Parallel()
	cases := []struct{ name, step string }{
		{"unknown names", "- call_service: {service: bank, operation: charge, as: a%d, input: {v: $unknown%[1]d}}\n"},
		{"unknown services", "- call_service: {service: bnak%d, operation: charge}\n"},
		{"unknown steps", "- cal_service%d: {service: bank, operation: charge}\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "specql.db"), Logger: slog.New(slog.DiscardHandler)})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			reg := registry.New(s, nil, nil, time.Now)
			_, problems, err := reg.Apply(t.Context(), registry.FromFiles(spec.File{Name: "registry.yaml", Content: []byte(registryText)}, nil, ""))
			require.NoError(t, err)
			require.NoError(t, problems.Err())

			var text strings.Builder
			text.WriteString("actions:\n")
			for i := range 5000 {
				fmt.Fprintf(&text, c.step, i)
			}
			began := time.Now()
			_, err = (&api.Orchestrator{Store: s, Registry: reg, Intake: &intake.Intake{Registry: reg, Rows: s}, Logger: slog.New(slog.DiscardHandler)}).
				ExecuteAction(auth.With(t.Context(), auth.Anonymous("test", "")), &specqlv1.ExecuteActionRequest{Workflow: text.String()})
			require.Less(t, time.Since(began), 10*time.Second)
			st := fault.ToStatus(err)
			require.Equal(t, codes.InvalidArgument, st.Code(), "%v", err)
			listed := 0
			for _, d := range st.Details() {
				if bad, ok := d.(*errdetails.BadRequest); ok {
					listed += len(bad.GetFieldViolations())
				}
			}
			require.Positive(t, listed)
			require.LessOrEqual(t, listed, 100)
			require.Less(t, proto.Size(st.Proto()), 64<<10)
		})
	}
}

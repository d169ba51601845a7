package api

import (
	"encoding/json"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func statusProto(s store.Status) specqlv1.Status {
	switch s {
	case store.Pending:
		return specqlv1.Status_STATUS_PENDING
	case store.Running:
		return specqlv1.Status_STATUS_RUNNING
	case store.Completed:
		return specqlv1.Status_STATUS_COMPLETED
	case store.Failed:
		return specqlv1.Status_STATUS_FAILED
	case store.Cancelled:
		return specqlv1.Status_STATUS_CANCELLED
	}
	return specqlv1.Status_STATUS_UNSPECIFIED
}

func statusOf(s specqlv1.Status) (store.Status, bool) {
	for _, status := range []store.Status{store.Pending, store.Running, store.Completed, store.Failed, store.Cancelled} {
		if statusProto(status) == s {
			return status, true
		}
	}
	return "", false
}

func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// value reads stored JSON, or JSON as it came, in which a name may be there twice: the last one counts, as in the
// database. It is nil where there is none or it is damaged.
func value(raw json.RawMessage) *structpb.Value {
	if len(raw) == 0 {
		return nil
	}
	var plain any
	if json.Unmarshal(raw, &plain) != nil {
		return nil
	}
	return valueOf(plain)
}

// valueOf is nil for what JSON does not have.
func valueOf(plain any) *structpb.Value {
	v, err := structpb.NewValue(plain)
	if err != nil {
		return nil
	}
	return v
}

// output of a job, which was read already where it ended here.
func output(j *store.Job) *structpb.Value {
	if j.OutputValue != nil {
		return valueOf(j.OutputValue)
	}
	return value(j.Output)
}

func object(raw json.RawMessage) *structpb.Struct {
	return value(raw).GetStructValue()
}

// fromMap makes a Struct of values as YAML has them, by way of JSON.
func fromMap(m map[string]any) *structpb.Struct {
	if m == nil {
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil
	}
	return object(b)
}

func runProto(r *store.Run) *specqlv1.Run {
	return &specqlv1.Run{
		Id: r.ID, Entity: r.Entity, Action: r.Action, EntityId: r.EntityID, Status: statusProto(r.Status),
		Input: object(r.Input), Output: value(r.Output), Error: r.Err.ToProto(),
		CreatedAt: timeProto(r.CreatedAt), StartedAt: timeProto(r.StartedAt), CompletedAt: timeProto(r.CompletedAt),
		IdempotencyKey: r.IdempotencyKey, CorrelationId: r.CorrelationID, Retries: int32(r.Retries), //nolint:gosec // bounded
	}
}

func jobProto(j *store.Job) *specqlv1.Job {
	out := &specqlv1.Job{
		Id: j.ID, RunId: j.RunID, StepPath: j.StepPath, Service: j.Service, Operation: j.Operation,
		ExecutionType: j.ExecutionType, Status: statusProto(j.Status),
		Attempts: int32(j.Attempts), MaxAttempts: int32(j.MaxAttempts), //nolint:gosec // bounded
		Input: object(j.Input), Output: output(j), Error: j.Err.ToProto(), IdempotencyKey: j.IdempotencyKey,
		CreatedAt: timeProto(j.CreatedAt), StartedAt: timeProto(j.StartedAt), CompletedAt: timeProto(j.CompletedAt),
	}
	lenient := protojson.UnmarshalOptions{DiscardUnknown: true}
	if out.ResourceUsage = j.Usage; j.Usage == nil && len(j.ResourceUsage) > 0 {
		u := &runnerv1.ResourceUsage{}
		if lenient.Unmarshal(j.ResourceUsage, u) == nil {
			out.ResourceUsage = u
		}
	}
	if out.SecurityContext = j.Security; j.Security == nil && len(j.SecurityContext) > 0 {
		s := &runnerv1.SecurityContext{}
		if lenient.Unmarshal(j.SecurityContext, s) == nil {
			out.SecurityContext = s
		}
	}
	return out
}

func stepProto(s *store.Step) *specqlv1.Step {
	return &specqlv1.Step{StepPath: s.StepPath, Kind: s.Kind, Signal: s.Name, Until: timeProto(s.Until)}
}

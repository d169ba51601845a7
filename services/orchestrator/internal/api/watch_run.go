package api

import (
	"google.golang.org/grpc"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
)

// WatchRun implements OrchestratorService.
func (o *Orchestrator) WatchRun(req *specqlv1.WatchRunRequest, stream grpc.ServerStreamingServer[specqlv1.WatchRunResponse]) error {
	if err := checkID(req.GetId()); err != nil {
		return err
	}
	if req.GetAfterSequence() < 0 {
		var v intake.Violations
		v.Add("after_sequence", "must not be negative")
		return v.Err()
	}
	if err := o.visible(stream.Context(), req.GetId()); err != nil {
		return err
	}
	err := o.Engine.Watch(stream.Context(), req.GetId(), req.GetAfterSequence(), req.GetLogs(), func(ev *engine.Event) error {
		m := &specqlv1.WatchRunResponse{Sequence: ev.Sequence, Time: timeProto(ev.Time)}
		switch {
		case ev.Run != nil:
			run := runProto(ev.Run)
			waiting, err := o.Engine.Waiting(stream.Context(), ev.Run)
			if err != nil {
				return err
			}
			for _, s := range waiting {
				run.Waiting = append(run.Waiting, stepProto(s))
			}
			m.Event = &specqlv1.WatchRunResponse_Run{Run: run}
		case ev.Job != nil:
			m.Event = &specqlv1.WatchRunResponse_Job{Job: jobProto(ev.Job)}
		case ev.Log != nil:
			l := ev.Log
			m.Event = &specqlv1.WatchRunResponse_Log{Log: &specqlv1.LogLine{
				JobId: l.JobID, StepPath: l.StepPath, Attempt: int32(l.Attempt), //nolint:gosec // bounded
				Line: l.Line, Stream: l.Stream, Text: l.Text,
			}}
		}
		return stream.Send(m)
	})
	return runError(err, req.GetId(), "")
}

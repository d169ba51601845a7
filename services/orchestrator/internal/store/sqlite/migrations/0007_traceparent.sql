-- The span of W3C Trace Context that a run belongs to, so that whoever walks it goes on with the trace.
ALTER TABLE jobs.tb_workflow_run ADD COLUMN traceparent TEXT;

package engine

import (
	"encoding/json"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// The stored form of usage and security is protojson's, with the protos' field names. Each job has both, and nearly all hold
// nothing but numbers and plain text, which is written here: protojson takes about ten times as long, and does the rest.

// protoJSON is nil for what is no JSON.
func protoJSON(m proto.Message) json.RawMessage {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil
	}
	return b
}

func usageJSON(u *runnerv1.ResourceUsage) json.RawMessage {
	w := &plainJSON{text: make([]byte, 0, 256)}
	w.open('{')
	w.float("duration_seconds", u.DurationSeconds)
	w.float("cpu_seconds", u.CpuSeconds)
	w.float("cpu_usage_percent", u.CpuUsagePercent)
	w.float("memory_mb", u.MemoryMb)
	w.float("peak_memory_mb", u.PeakMemoryMb)
	w.float("disk_read_mb", u.DiskReadMb)
	w.float("disk_write_mb", u.DiskWriteMb)
	w.float("network_rx_mb", u.NetworkRxMb)
	w.float("network_tx_mb", u.NetworkTxMb)
	w.integer("attempts", u.Attempts)
	w.string("source", u.GetSource())
	w.integer("status_code", u.StatusCode)
	w.float("request_bytes", u.RequestBytes)
	w.float("response_bytes", u.ResponseBytes)
	w.integer("exit_code", u.ExitCode)
	if u.OomKilled != nil {
		w.bool("oom_killed", u.GetOomKilled())
	}
	w.float("billed_duration_ms", u.BilledDurationMs)
	w.float("cost_usd", u.CostUsd)
	if u.ExecutedVersion != nil {
		w.name("executed_version")
		w.quoted(u.GetExecutedVersion())
	}
	w.close('}')
	return w.or(u)
}

func securityJSON(s *runnerv1.SecurityContext) json.RawMessage {
	w := &plainJSON{text: make([]byte, 0, 512)}
	w.open('{')
	w.string("policy_digest", s.GetPolicyDigest())
	if len(s.GetChecks()) > 0 {
		w.name("checks")
		w.open('[')
		for _, c := range s.GetChecks() {
			w.next()
			w.check(c)
		}
		w.close(']')
	}
	w.string("subject", s.GetSubject())
	w.string("tenant_id", s.GetTenantId())
	w.string("runner", s.GetRunner())
	if len(s.GetIsolation()) > 0 {
		w.name("isolation")
		w.open('[')
		for _, feature := range s.GetIsolation() {
			w.next()
			w.quoted(feature)
		}
		w.close(']')
	}
	w.close('}')
	return w.or(s)
}

func (w *plainJSON) check(c *runnerv1.PolicyCheck) {
	w.odd = w.odd || len(c.GetAllowedBy()) > 0 // they hold values of any kind, and are rare
	w.open('{')
	w.string("rule", c.GetRule())
	w.string("subject", c.GetSubject())
	if c.GetAllowed() {
		w.bool("allowed", true)
	}
	w.string("detail", c.GetDetail())
	w.string("rule_source", c.GetRuleSource())
	w.close('}')
}

// plainJSON is a text of JSON in the making.
type plainJSON struct {
	text []byte
	// odd says that it holds something that is left to protojson.
	odd bool
}

// or is the text, or what protojson makes of the message.
func (w *plainJSON) or(m proto.Message) json.RawMessage {
	if w.odd {
		return protoJSON(m)
	}
	return w.text
}

func (w *plainJSON) open(bracket byte) { w.text = append(w.text, bracket) }

func (w *plainJSON) close(bracket byte) { w.text = append(w.text, bracket) }

// next parts what comes from what is there.
func (w *plainJSON) next() {
	if last := w.text[len(w.text)-1]; last != '{' && last != '[' {
		w.text = append(w.text, ',')
	}
}

func (w *plainJSON) name(name string) {
	w.next()
	w.text = append(w.text, '"')
	w.text = append(w.text, name...)
	w.text = append(w.text, '"', ':')
}

func (w *plainJSON) float(name string, v *float64) {
	if v == nil {
		return
	}
	w.name(name)
	// Those that JSON does not have, and those that are written with an exponent, are left alone.
	size := math.Abs(*v)
	w.odd = w.odd || size != 0 && !(size >= 1e-6 && size < 1e21)
	w.text = strconv.AppendFloat(w.text, *v, 'f', -1, 64)
}

func (w *plainJSON) integer(name string, v *int32) {
	if v != nil {
		w.name(name)
		w.text = strconv.AppendInt(w.text, int64(*v), 10)
	}
}

func (w *plainJSON) bool(name string, v bool) {
	w.name(name)
	w.text = strconv.AppendBool(w.text, v)
}

// string writes nothing where it is empty.
func (w *plainJSON) string(name, v string) {
	if v != "" {
		w.name(name)
		w.quoted(v)
	}
}

func (w *plainJSON) quoted(v string) {
	for i := range len(v) {
		if c := v[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			w.odd = true
		}
	}
	w.text = append(w.text, '"')
	w.text = append(w.text, v...)
	w.text = append(w.text, '"')
}

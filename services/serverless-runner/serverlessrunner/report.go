package serverlessrunner

import (
	"encoding/base64"
	"encoding/json"
	"regexp"
	"strconv"
	"strings"
)

// report is what Lambda says of one invocation in its log. A figure that it does not say
// is nil.
type report struct {
	billedMS   *float64
	memoryMB   *float64
	maxUsedMB  *float64
	initMS     *float64
	durationMS *float64
	// errorType is the platform's, such as Runtime.OutOfMemory.
	errorType string
}

// lambdaTail is a log tail: the lines of the function, and the platform's report.
type lambdaTail struct {
	lines []tailLine
	// full: the tail has its whole 4 KB, so that earlier lines are missing.
	full   bool
	report *report
}

type tailLine struct {
	platform bool
	text     string
}

// maxTail is how much log Lambda sends, in bytes.
const maxTail = 4 << 10

// maxTailField bounds X-Amz-Log-Result in base64, should an endpoint send more than Lambda does.
const maxTailField = 64 << 10

var (
	reportField  = regexp.MustCompile(`(Duration|Billed Duration|Memory Size|Max Memory Used|Init Duration): ([0-9]+(?:\.[0-9]+)?) (ms|MB)`)
	reportStatus = regexp.MustCompile(`\tError Type: ([A-Za-z.]{1,100})`)
)

// parseTail reads the base64 log tail of one invocation. Only a report with its request id
// counts, and of several the last, which comes from the platform after the function's own lines.
func parseTail(encoded, requestID string) (lambdaTail, error) {
	encoded = encoded[:min(len(encoded), maxTailField)]
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return lambdaTail{}, err // the caller says what it was
	}
	t := lambdaTail{full: len(raw) >= maxTail}
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			continue
		}
		platform := false
		if r, ok := parseReport(line, requestID); ok {
			t.report, platform = r, true
		} else {
			platform = isPlatformLine(line, requestID)
		}
		t.lines = append(t.lines, tailLine{platform: platform, text: line})
	}
	return t, nil
}

func isPlatformLine(line, requestID string) bool {
	return strings.HasPrefix(line, "START RequestId: "+requestID) || strings.HasPrefix(line, "END RequestId: "+requestID) ||
		strings.HasPrefix(line, "INIT_START ") || strings.HasPrefix(line, "XRAY TraceId: ") || strings.HasPrefix(line, `{"time":"`) && strings.Contains(line, `"type":"platform.`)
}

// parseReport reads a REPORT line in the text or in the JSON log format.
func parseReport(line, requestID string) (*report, bool) {
	if strings.HasPrefix(line, "{") {
		return parseJSONReport(line, requestID)
	}
	rest, ok := strings.CutPrefix(line, "REPORT RequestId: "+requestID)
	if !ok || requestID == "" || rest != "" && rest[0] != '\t' && rest[0] != ' ' {
		return nil, false
	}
	r := &report{}
	for _, m := range reportField.FindAllStringSubmatch(rest, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			continue
		}
		switch m[1] {
		case "Duration":
			r.durationMS = &v
		case "Billed Duration":
			r.billedMS = &v
		case "Memory Size":
			r.memoryMB = &v
		case "Max Memory Used":
			r.maxUsedMB = &v
		case "Init Duration":
			r.initMS = &v
		}
	}
	if m := reportStatus.FindStringSubmatch(rest); m != nil {
		r.errorType = m[1]
	}
	return r, true
}

func parseJSONReport(line, requestID string) (*report, bool) {
	var l struct {
		Type   string `json:"type"`
		Record struct {
			RequestID string `json:"requestId"`
			ErrorType string `json:"errorType"`
			Metrics   struct {
				DurationMS *float64 `json:"durationMs"`
				BilledMS   *float64 `json:"billedDurationMs"`
				MemoryMB   *float64 `json:"memorySizeMB"`
				MaxUsedMB  *float64 `json:"maxMemoryUsedMB"`
				InitMS     *float64 `json:"initDurationMs"`
			} `json:"metrics"`
		} `json:"record"`
	}
	if json.Unmarshal([]byte(line), &l) != nil || l.Type != "platform.report" || requestID == "" || l.Record.RequestID != requestID {
		return nil, false
	}
	m := l.Record.Metrics
	return &report{
		billedMS: m.BilledMS, memoryMB: m.MemoryMB, maxUsedMB: m.MaxUsedMB, initMS: m.InitMS,
		durationMS: m.DurationMS, errorType: clip(l.Record.ErrorType, 100),
	}, true
}

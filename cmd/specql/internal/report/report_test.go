package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/cmd/specql/internal/load"
)

func made(name string, n int, base time.Duration) Test {
	r := &load.Result{Elapsed: 10 * time.Second, Unsent: 3}
	for i := range n {
		r.Samples = append(r.Samples, load.Sample{Start: time.Duration(i) * 10 * time.Second / time.Duration(n+1), Latency: base * time.Duration(1+i%7), Failed: i%10 == 0})
	}
	r.Failures = []load.Failure{{Code: "TIMEOUT", Count: (n + 9) / 10, Message: `<script>alert("x")</script>`}}
	r.Figures = []load.Figure{{Name: "cpuSeconds", Values: []float64{0.1, 0.2, 0.4}}, {Name: "peakMemoryMb", Values: []float64{8, 8, 16}}}
	return Test{Name: name, ExecutionType: "shell", Load: "10 callers", Result: r}
}

// vectors are the drawings of a page; every one is well-formed.
func vectors(t *testing.T, page string) []string {
	t.Helper()
	found := regexp.MustCompile(`(?s)<svg.*?</svg>`).FindAllString(page, -1)
	for _, svg := range found {
		d := xml.NewDecoder(strings.NewReader(svg))
		for {
			_, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err, svg)
		}
		require.NotRegexp(t, `NaN|Inf|e[+-]\d`, svg)
	}
	return found
}

func TestWrite(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	tests := []Test{made("api.get", 500, 2*time.Millisecond), made(`<b>sh.echo</b>`, 80, 50*time.Millisecond)}
	require.NoError(t, Write(&b, "specql benchmark", time.Unix(0, 0), tests))
	page := b.String()
	require.NotContains(t, page, "ended early")
	require.NotContains(t, page, "<script")
	require.NotContains(t, page, "<b>sh")
	require.Contains(t, page, "&lt;b&gt;sh.echo&lt;/b&gt;")
	require.NotRegexp(t, `(?i)(src|href)=|url\(|@import|https?:`, page, "nothing is loaded from anywhere")
	require.NotContains(t, page, "ZgotmplZ", "the template refused nothing")
	drawn := vectors(t, page)
	require.Len(t, drawn, 3+4, "three plots, and a bar for each test and figure")
	for i, title := range []string{"Latency of the calls", "Throughput over time", "Latency over time"} {
		require.Contains(t, drawn[i], title)
		require.GreaterOrEqual(t, strings.Count(drawn[i], `class="curve`), 2, "a line for each test")
		require.GreaterOrEqual(t, strings.Count(drawn[i], "<text"), 6)
	}
	require.Contains(t, page, "3 calls were due")
	require.Contains(t, page, "api.get, failed (dashed)")
	// A line of the histogram rises from the ground at its first call, falls to it at its last, and hides nobody's beyond.
	points := regexp.MustCompile(`[ML]([\d.]+) ([\d.]+)`).FindAllStringSubmatch(regexp.MustCompile(`class="curve" d="([^"]+)"`).FindStringSubmatch(drawn[0])[1], -1)
	require.Len(t, points, 2+2*14, "14 of the 36 steps have calls between 2 ms and 14 ms, or lie between them")
	require.Equal(t, []string{"210", "210"}, []string{strings.TrimSuffix(points[0][2], ".0"), strings.TrimSuffix(points[len(points)-1][2], ".0")})
	require.Contains(t, drawn[0], ">10 ms</text>", "marks are round")
}

func TestWriteOfAnInterruptedTest(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	test := made("api.get", 5, time.Millisecond)
	test.Result.Interrupted = true
	require.NoError(t, Write(&b, "specql load-test", time.Unix(0, 0), []Test{test}))
	require.Contains(t, b.String(), "api.get: the test was ended early.")
}

func TestWriteOfNothing(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	one := made("one", 1, 0)
	one.Result.Elapsed = 0
	require.NoError(t, Write(&b, "t", time.Unix(0, 0), []Test{{Name: "none", Result: &load.Result{}}, one}))
	vectors(t, b.String())
	b.Reset()
	require.NoError(t, Write(&b, "t", time.Unix(0, 0), nil))
	require.Contains(t, b.String(), "No call ended.")
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{0: "0 bytes", 145. / (1 << 20): "145 bytes", 0.373: "382 KiB", 4.03: "4.03 MiB", 2048: "2048 MiB"} {
		require.Equal(t, want, mebibytes(v))
	}
	require.Equal(t, "41 bytes", bytesOf(41))
}

func TestSeconds(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{0.0000125: "12.5 µs", 0.0123: "12.3 ms", 1.5: "1.50 s", 600: "10.0 min", 0: "0 s"} {
		require.Equal(t, want, Seconds(v))
	}
	require.Equal(t, "–", Seconds(math.NaN()))
}

package telemetry_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/telemetry"
)

func TestLabelsAreBounded(t *testing.T) {
	t.Parallel()
	l := telemetry.NewLabel(3, "http")
	require.Equal(t, "http", l.Value("http"))
	require.Equal(t, "a", l.Value("a"))
	require.Equal(t, "b", l.Value("b"))
	for i := range 1000 {
		require.Equal(t, "other", l.Value("c"+strconv.Itoa(i)))
	}
	require.Equal(t, "a", l.Value("a"), "who came first stays")
	require.Equal(t, "other", l.Value(""))
	require.Equal(t, "other", telemetry.NewLabel(1, "http").Value("shell"))
}

func TestFiguresWithoutATraceHaveNoExemplar(t *testing.T) {
	t.Parallel()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "x_total"})
	telemetry.Count(t.Context(), c, 2)
	require.InDelta(t, 2, testutil.ToFloat64(c), 0)
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x_seconds"})
	telemetry.Observe(t.Context(), h, time.Second)
	require.Equal(t, 1, testutil.CollectAndCount(h))
}

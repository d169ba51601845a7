package runner

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestTheEndOfAJobIsNotThatOfTheNext: whoever tells a job's end late, when the next one has the stream, leaves that one alone.
func TestTheEndOfAJobIsNotThatOfTheNext(t *testing.T) {
	t.Parallel()
	s := &talk{wake: make(chan struct{}, 1)}
	first, second := &job{feed: &feed{}}, &job{feed: &feed{}}
	told := first.feed.subscribe(s.wake, false, time.Time{})
	told.ended = true
	s.follow(second, second.feed.subscribe(s.wake, true, time.Time{}))
	require.NoError(t, s.tell(first, told))
	require.Same(t, second, s.job)
}

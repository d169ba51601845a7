package sandbox

import (
	"errors"
	"log/slog"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// countedRoom is a room without anything in it.
type countedRoom struct{ closed *int }

func (countedRoom) Joins() []*os.File { return nil }

func (r countedRoom) Close() { *r.closed++ }

func TestWithoutARoomNoJobIsLessHeld(t *testing.T) {
	full := errors.New("no more control groups")
	_, err := New(Options{Logger: slog.New(slog.DiscardHandler), NewRoom: func() (Room, error) { return nil, full }})
	require.ErrorIs(t, err, full)
}

func TestRoomsThatNoJobGotAreClosed(t *testing.T) {
	made, closed := 0, 0
	s, err := New(Options{Logger: slog.New(slog.DiscardHandler), NewRoom: func() (Room, error) { made++; return countedRoom{&closed}, nil }})
	require.NoError(t, err)
	require.True(t, s.Contained())
	require.Equal(t, 1, made)
	l, err := s.take(true)
	require.NoError(t, err)
	s.discard(l)
	require.Equal(t, 1, closed)
	l, err = s.spawn(true)
	require.NoError(t, err)
	s.idle[true] = append(s.idle[true], l)
	s.Close()
	require.Equal(t, made, closed)
}

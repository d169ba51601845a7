package dockerrunner

import (
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/stretchr/testify/require"
)

func TestTheEndForMemoryIsToldFromOthers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		state container.State
		kills int
		peak  *float64
		limit float64
		want  bool
	}{
		"the engine says so":            {state: container.State{OOMKilled: true}, want: true},
		"the kernel has counted it":     {kills: 1, want: true},
		"killed, with all in use":       {state: container.State{ExitCode: 137}, peak: new(47.9), limit: 48, want: true},
		"killed, with some in use":      {state: container.State{ExitCode: 137}, peak: new(40.0), limit: 48},
		"killed, not measured":          {state: container.State{ExitCode: 137}, limit: 48},
		"killed, without a limit":       {state: container.State{ExitCode: 137}, peak: new(48.0)},
		"failed, with all in use":       {state: container.State{ExitCode: 1}, peak: new(48.0), limit: 48},
		"ended well, with all in use":   {peak: new(48.0), limit: 48},
		"ended by its own other signal": {state: container.State{ExitCode: 139}, peak: new(48.0), limit: 48},
	} {
		require.Equal(t, c.want, endedForMemory(&c.state, c.kills, c.peak, c.limit), name)
	}
}

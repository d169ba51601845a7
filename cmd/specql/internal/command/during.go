package command

import (
	"sync"
	"time"

	"github.com/specql/mesh/cmd/specql/internal/terminal"
)

// patience is how long a command works without a sign of it on a terminal.
const patience = time.Second

// during does something that may take a while. On a terminal, standard error then says what.
func during[T any](s IO, what string, do func() (T, error)) (T, error) {
	screen := s.err()
	if !screen.Live {
		return do()
	}
	sign := terminal.NewProgress(s.Err, screen, 0)
	ended := make(chan struct{})
	var drawing sync.WaitGroup
	drawing.Go(func() {
		wait := time.NewTimer(patience)
		defer wait.Stop()
		select {
		case <-ended:
			return
		case <-wait.C:
		}
		defer sign.End()
		ticker := time.NewTicker(frame)
		defer ticker.Stop()
		for {
			sign.Draw(what, 0)
			select {
			case <-ended:
				return
			case <-ticker.C:
			}
		}
	})
	defer drawing.Wait()
	defer close(ended)
	return do()
}

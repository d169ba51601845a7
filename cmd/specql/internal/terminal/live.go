package terminal

import (
	"fmt"
	"io"
	"strings"
)

// Live is a block of lines at the bottom of a terminal that is drawn again and again, with
// lines of text above it that stay. It is not safe for concurrent use.
type Live struct {
	w      io.Writer
	screen Screen
	drawn  int
}

// NewLive draws on a terminal; screen.Live must be set.
func NewLive(w io.Writer, screen Screen) *Live { return &Live{w: w, screen: screen} }

// Draw writes lines above the block, which stay, and then the block anew. Lines must be clean
// and fit the width. A block higher than the terminal shows its end.
func (l *Live) Draw(above, block []string) error {
	_, height := l.screen.Size()
	if room := height - 1; len(block) > room {
		hidden := len(block) - room + 1
		block = append([]string{fmt.Sprintf("… %d lines above", hidden)}, block[hidden:]...)
	}
	return l.write(above, block)
}

// Finish writes the block a last time, whole, and leaves it.
func (l *Live) Finish(above, block []string) error {
	err := l.write(above, block)
	l.drawn = 0
	return err
}

func (l *Live) write(above, block []string) error {
	var b strings.Builder
	if l.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r", l.drawn)
	}
	b.WriteString("\x1b[J") // clears to the end of the screen
	for _, line := range above {
		b.WriteString(line + "\n")
	}
	for _, line := range block {
		b.WriteString(line + "\n")
	}
	l.drawn = len(block)
	_, err := io.WriteString(l.w, b.String())
	return err
}

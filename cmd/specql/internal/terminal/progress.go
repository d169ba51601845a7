package terminal

import (
	"io"

	"github.com/schollz/progressbar/v3"
)

// barWidth is how many cells a bar has.
const barWidth = 24

// Progress is a line at the bottom of a terminal that says how far something is: a bar, or a sign
// that turns where nobody knows how much there is to do. It is not safe for concurrent use.
type Progress struct {
	bar    *progressbar.ProgressBar
	screen Screen
	whole  int64
}

// NewProgress draws on a terminal; screen.Live must be set. whole is how much there is to do; 0
// where nobody knows.
func NewProgress(w io.Writer, screen Screen, whole int64) *Progress {
	theme, signs := progressbar.Theme{Saucer: "█", SaucerPadding: "░"}, []string{"⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"}
	if !screen.Unicode {
		theme, signs = progressbar.Theme{Saucer: "#", SaucerPadding: "."}, []string{"|", "/", "-", `\`}
	}
	options := []progressbar.Option{
		progressbar.OptionSetWriter(w), progressbar.OptionUseANSICodes(true), progressbar.OptionClearOnFinish(), progressbar.OptionSetPredictTime(false),
		progressbar.OptionSetWidth(barWidth), progressbar.OptionSetTheme(theme), progressbar.OptionSpinnerCustom(signs),
		progressbar.OptionSetSpinnerChangeInterval(0), // drawn by Draw alone: a goroutine of the library's own could draw after End
	}
	most := whole
	if whole > 0 {
		options = append(options, progressbar.OptionShowDescriptionAtLineEnd())
	} else {
		most = -1 // which is how the library is told that nobody knows
	}
	p := &Progress{screen: screen, whole: whole, bar: progressbar.NewOptions64(most, options...)}
	p.bar.StartWithoutRender() // its clock
	return p
}

// Draw says how much is done, and a text of one clean line beside it.
func (p *Progress) Draw(text string, done int64) {
	columns, _ := p.screen.Size()
	if p.whole > 0 {
		// What is whole would take the line away, which End does.
		_ = p.bar.Set64(min(max(done, 0), p.whole-1))
	}
	p.bar.Describe(Cut(text, columns-barWidth-10)) // and a percentage, or the time
}

// End takes the line away.
func (p *Progress) End() { _ = p.bar.Finish() }

// Package terminal writes text to terminals: made harmless, cut to a width, in colour where
// the terminal shows it.
package terminal

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/mattn/go-runewidth"
)

// cells measures text the same way on every machine, whatever the locale.
var cells = &runewidth.Condition{EastAsianWidth: false, StrictEmojiNeutral: true}

// Clean makes one line of text harmless: no control character, escape sequence or direction
// override reaches the terminal, and invalid UTF-8 becomes U+FFFD. Tabs and line ends become
// spaces. What was removed is shown as an escape such as \x1b, so that nothing is hidden.
func Clean(s string) string {
	if isClean(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 16)
	for _, r := range s {
		switch {
		case r == '\t' || r == '\n' || r == '\r':
			b.WriteByte(' ')
		case r < 0x20 || (r >= 0x7f && r < 0xa0):
			b.WriteString(`\x`)
			b.WriteByte(hex[r>>4])
			b.WriteByte(hex[r&15])
		case hidden(r):
			b.WriteString(`\u`)
			for shift := 12; shift >= 0; shift -= 4 {
				b.WriteByte(hex[(r>>shift)&15])
			}
		default:
			b.WriteRune(r) // ranging over invalid UTF-8 gives U+FFFD
		}
	}
	return b.String()
}

const hex = "0123456789abcdef"

func isClean(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r < 0x20 || (r >= 0x7f && r < 0xa0) || hidden(r) {
			return false
		}
	}
	return true
}

// hidden are characters that change how the text around them is shown: direction marks and
// overrides, line separators, and characters of the basic plane that are not to be shown at all.
func hidden(r rune) bool {
	switch {
	case r == 0x200d: // joins emoji
		return false
	case r > 0xffff:
		return false
	case r == 0x2028 || r == 0x2029:
		return true
	}
	return unicode.Is(unicode.Cf, r)
}

// Width is the number of cells that a text takes.
func Width(s string) int { return cells.StringWidth(s) }

// Cut shortens a text to a number of cells, with … at its end where something was cut off.
func Cut(s string, width int) string {
	if width <= 0 {
		return ""
	}
	return cells.Truncate(s, width, "…")
}

// Pad fills a text with spaces on the right to a number of cells.
func Pad(s string, width int) string {
	if n := width - Width(s); n > 0 {
		return s + strings.Repeat(" ", n)
	}
	return s
}

// PadLeft fills a text with spaces on the left to a number of cells.
func PadLeft(s string, width int) string {
	if n := width - Width(s); n > 0 {
		return strings.Repeat(" ", n) + s
	}
	return s
}

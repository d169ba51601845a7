package terminal

import (
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// Style is a colour or weight of text.
type Style string

// The styles.
const (
	Plain  Style = ""
	Bold   Style = "1"
	Dim    Style = "2"
	Red    Style = "31"
	Green  Style = "32"
	Yellow Style = "33"
	Cyan   Style = "36"
)

// Screen says what an output can show.
type Screen struct {
	// Live: the output is a terminal on which lines can be drawn again.
	Live bool
	// Colour: styles are shown.
	Colour bool
	// Unicode: box drawing and symbols are shown.
	Unicode bool
	size    func() (width, height int)
}

// Detect looks at an output and the environment: NO_COLOR, TERM and the locale.
func Detect(w io.Writer, getenv func(string) string) Screen {
	s := Screen{Unicode: unicodeLocale(getenv)}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return s
	}
	if t := getenv("TERM"); t == "dumb" || t == "" {
		return s
	}
	s.Live = true
	s.Colour = getenv("NO_COLOR") == ""
	s.size = func() (int, int) {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil {
			return 0, 0
		}
		return width, height
	}
	return s
}

func unicodeLocale(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := getenv(name); v != "" {
			v = strings.ToLower(v)
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return true // nothing says; today's terminals speak UTF-8
}

// Size is the number of columns and lines; 100 and 40 where nothing says.
func (s Screen) Size() (width, height int) {
	if s.size != nil {
		width, height = s.size()
	}
	if width <= 0 {
		width = 100
	}
	if height <= 0 {
		height = 40
	}
	return width, height
}

// Paint puts a text into a style, where colours are shown.
func (s Screen) Paint(style Style, text string) string {
	if !s.Colour || style == Plain || text == "" {
		return text
	}
	return "\x1b[" + string(style) + "m" + text + "\x1b[0m"
}

package terminal

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain":                          "plain",
		"grüße 日本 👩‍💻":                   "grüße 日本 👩‍💻",
		"a\tb\r\nc":                      "a b  c",
		"\x1b[2J\x1b]0;title\x07":        `\x1b[2J\x1b]0;title\x07`,
		"\x1b]8;;http://evil\x1b\\x":     `\x1b]8;;http://evil\x1b\x`,
		"\u009b31m":                      `\x9b31m`,
		"\x00\x7f":                       `\x00\x7f`,
		"bad \xff\xfe utf8":              "bad \ufffd\ufffd utf8",
		"user\u202egnp.exe":              `user\u202egnp.exe`,
		"a\u2066b\u2069c\u2028d\ufeff":   `a\u2066b\u2069c\u2028d\ufeff`,
		"soft\u00adhyphen zero\u200bwid": `soft\u00adhyphen zero\u200bwid`,
	} {
		require.Equal(t, want, Clean(in), "%q", in)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31mred\x1b[0m\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		out := Clean(s)
		require.True(t, utf8.ValidString(out))
		require.False(t, strings.ContainsFunc(out, func(r rune) bool { return r < 0x20 || (r >= 0x7f && r < 0xa0) || r == 0x202e }), "%q", out)
		for _, width := range []int{0, 1, 2, 7} {
			require.LessOrEqual(t, Width(Cut(out, width)), width, "%q", out)
		}
	})
}

func TestCutAndPad(t *testing.T) {
	require.Equal(t, "abc", Cut("abc", 3))
	require.Equal(t, "ab…", Cut("abcd", 3))
	require.Equal(t, "日…", Cut("日本語", 4)) // a wide character is never halved
	require.Empty(t, Cut("abc", 0))
	require.Equal(t, "日本  ", Pad("日本", 6))
	require.Equal(t, "  12", PadLeft("12", 4))
	require.Equal(t, "12345", PadLeft("12345", 4))
}

func TestDetect(t *testing.T) {
	env := func(pairs ...string) func(string) string {
		return func(name string) string {
			for i := 0; i < len(pairs); i += 2 {
				if pairs[i] == name {
					return pairs[i+1]
				}
			}
			return ""
		}
	}
	require.True(t, Detect(nil, env()).Unicode)
	require.True(t, Detect(nil, env("LANG", "de_DE.UTF-8")).Unicode)
	require.False(t, Detect(nil, env("LC_ALL", "C", "LANG", "de_DE.UTF-8")).Unicode)
	s := Detect(&bytes.Buffer{}, env("TERM", "xterm"))
	require.False(t, s.Live)
	require.Equal(t, "x", s.Paint(Red, "x"))
	require.Equal(t, "\x1b[31mx\x1b[0m", Screen{Colour: true}.Paint(Red, "x"))
}

func TestLiveDrawsInPlace(t *testing.T) {
	var out bytes.Buffer
	l := NewLive(&out, Screen{Live: true, size: func() (int, int) { return 80, 4 }})
	require.NoError(t, l.Draw(nil, []string{"a", "b"}))
	require.Equal(t, "\x1b[Ja\nb\n", out.String())
	out.Reset()
	require.NoError(t, l.Draw([]string{"log"}, []string{"a2", "b2", "c2"}))
	require.Equal(t, "\x1b[2A\r\x1b[Jlog\na2\nb2\nc2\n", out.String())
	out.Reset()
	require.NoError(t, l.Draw(nil, []string{"1", "2", "3", "4", "5"}))
	require.Equal(t, "\x1b[3A\r\x1b[J… 3 lines above\n4\n5\n", out.String(), "no more than the terminal's height")
	out.Reset()
	require.NoError(t, l.Finish(nil, []string{"1", "2", "3", "4", "5"}))
	require.Equal(t, "\x1b[3A\r\x1b[J1\n2\n3\n4\n5\n", out.String())
}

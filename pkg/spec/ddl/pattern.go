package ddl

import (
	"errors"
	"fmt"
	"regexp/syntax"
	"strings"
	"unicode"
)

// Bounds on patterns. PostgreSQL finds out that an expression is too large when it is first
// used, which is too late: every insert would fail.
const (
	maxRepeat = 255  // PostgreSQL's own
	maxStates = 1000 // characters of the expression, each counted as often as it is repeated
	maxRanges = 64   // ranges of one class
)

// Pattern writes a regular expression of RE2's syntax as one of PostgreSQL's that matches the
// same texts, for the operator ~. An error says why there is none.
func Pattern(text string) (string, error) {
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return "", errors.New("it is not a regular expression")
	}
	var t translator
	t.write(parsed, 1)
	if t.err != nil {
		return "", t.err
	}
	// The director says which flavour it is, whatever the database's default.
	return "***:" + t.out.String(), nil
}

type translator struct {
	out    strings.Builder
	states int
	// repeated is set inside what is repeated.
	repeated bool
	err      error
}

func (t *translator) fail(format string, args ...any) {
	if t.err == nil {
		t.err = fmt.Errorf(format, args...)
	}
}

// count notes that n characters are matched, times as often.
func (t *translator) count(times int) {
	if t.states += times; t.states > maxStates {
		t.fail("it is too large for PostgreSQL")
	}
}

// word is a character that \b knows as one of a word.
const word = "[0-9A-Za-z_]"

func (t *translator) write(re *syntax.Regexp, times int) {
	if t.err != nil {
		return
	}
	switch re.Op {
	case syntax.OpEmptyMatch:
		t.out.WriteString("(?:)")
	case syntax.OpLiteral:
		for _, r := range re.Rune {
			t.count(times)
			if re.Flags&syntax.FoldCase != 0 {
				t.class(folded(r))
			} else {
				t.rune(r)
			}
		}
	case syntax.OpCharClass:
		t.count(times)
		t.class(re.Rune)
	case syntax.OpAnyCharNotNL:
		t.count(times)
		t.out.WriteString(`[^\n]`)
	case syntax.OpAnyChar:
		t.count(times)
		t.out.WriteByte('.') // a newline too, as no option says otherwise
	case syntax.OpBeginText:
		t.assert("^")
	case syntax.OpEndText:
		t.assert("$")
	case syntax.OpBeginLine:
		t.assert(`(?:^|(?<=\n))`)
	case syntax.OpEndLine:
		t.assert(`(?:$|(?=\n))`)
	case syntax.OpWordBoundary:
		t.assert("(?:(?<=" + word + ")(?!" + word + ")|(?<!" + word + ")(?=" + word + "))")
	case syntax.OpNoWordBoundary:
		t.assert("(?:(?<=" + word + ")(?=" + word + ")|(?<!" + word + ")(?!" + word + "))")
	case syntax.OpCapture:
		t.group(re.Sub, "", times)
	case syntax.OpConcat:
		for _, sub := range re.Sub {
			t.write(sub, times)
		}
	case syntax.OpAlternate:
		t.group(re.Sub, "|", times)
	case syntax.OpStar:
		t.repeat(re.Sub[0], "*", times)
	case syntax.OpPlus:
		t.repeat(re.Sub[0], "+", times)
	case syntax.OpQuest:
		t.repeat(re.Sub[0], "?", times)
	case syntax.OpRepeat:
		t.counted(re, times)
	default:
		t.fail("PostgreSQL has nothing like it")
	}
}

// assert writes a condition on a place. PostgreSQL does not take all of them below a repetition.
func (t *translator) assert(text string) {
	if t.repeated {
		t.fail("PostgreSQL cannot repeat a condition on a place")
	}
	t.out.WriteString(text)
}

func (t *translator) group(subs []*syntax.Regexp, between string, times int) {
	t.out.WriteString("(?:")
	for i, sub := range subs {
		if i > 0 {
			t.out.WriteString(between)
		}
		t.write(sub, times)
	}
	t.out.WriteByte(')')
}

// repeat writes what is repeated. Whether as few or as many as can be makes no difference to
// whether there is a match.
func (t *translator) repeat(sub *syntax.Regexp, operator string, times int) {
	before := t.repeated
	t.repeated = true
	t.group([]*syntax.Regexp{sub}, "", times)
	t.repeated = before
	t.out.WriteString(operator)
}

func (t *translator) counted(re *syntax.Regexp, times int) {
	if re.Min > maxRepeat || re.Max > maxRepeat {
		t.fail("PostgreSQL repeats at most %d times", maxRepeat)
		return
	}
	operator := fmt.Sprintf("{%d,%d}", re.Min, re.Max)
	switch re.Max {
	case re.Min:
		operator = fmt.Sprintf("{%d}", re.Min)
	case -1:
		operator = fmt.Sprintf("{%d,}", re.Min)
	}
	t.repeat(re.Sub[0], operator, times*max(1, re.Min, re.Max))
}

// folded are the ranges of a character in every case.
func folded(r rune) []rune {
	out := []rune{r, r}
	for other := unicode.SimpleFold(r); other != r; other = unicode.SimpleFold(other) {
		out = append(out, other, other)
	}
	return out
}

// class writes a class of characters. One that reaches the last character is written as what
// it leaves out; NUL, which no text has, belongs to neither.
func (t *translator) class(ranges []rune) {
	n := len(ranges)
	if n == 0 {
		t.fail("it matches nothing")
		return
	}
	open := "["
	if ranges[n-1] == unicode.MaxRune {
		open = "[^"
		var rest []rune
		low := rune(1)
		for i := 0; i < n; i += 2 {
			if ranges[i] > low {
				rest = append(rest, low, ranges[i]-1)
			}
			low = ranges[i+1] + 1
		}
		if len(rest) == 0 {
			t.out.WriteByte('.')
			return
		}
		ranges = rest
	}
	if len(ranges)/2 > maxRanges {
		t.fail("it has a class of too many ranges for PostgreSQL")
		return
	}
	t.out.WriteString(open)
	for i := 0; i < len(ranges); i += 2 {
		low, high := max(ranges[i], 1), ranges[i+1]
		if high < low {
			t.fail("it matches a NUL character")
			return
		}
		t.member(low)
		if high > low {
			if high > low+1 {
				t.out.WriteByte('-')
			}
			t.member(high)
		}
	}
	t.out.WriteByte(']')
}

// rune writes a character outside a class.
func (t *translator) rune(r rune) {
	switch {
	case r == 0:
		t.fail("it matches a NUL character")
	case r < unicode.MaxASCII && strings.ContainsRune(`\^$.|?*+()[]{}`, r):
		t.out.WriteByte('\\')
		t.out.WriteRune(r)
	default:
		t.plain(r)
	}
}

// member writes a character of a class.
func (t *translator) member(r rune) {
	if r < unicode.MaxASCII && strings.ContainsRune(`\^-[]`, r) {
		t.out.WriteByte('\\')
		t.out.WriteRune(r)
		return
	}
	t.plain(r)
}

func (t *translator) plain(r rune) {
	switch {
	case r == '\n':
		t.out.WriteString(`\n`)
	case r == '\t':
		t.out.WriteString(`\t`)
	case unicode.IsGraphic(r) && !unicode.IsMark(r) && (r == ' ' || !unicode.IsSpace(r)):
		t.out.WriteRune(r)
	case r <= 0xFFFF:
		fmt.Fprintf(&t.out, `\u%04X`, r)
	default:
		fmt.Fprintf(&t.out, `\U%08X`, r)
	}
}

package expr

import (
	"strings"
	"unicode/utf8"
)

// CEL has no `$`. Before it is parsed, every name that can be a variable gets a prefix: `$status` becomes
// d__status and a bare `status` becomes b__status. So roots never clash with CEL's reserved words or with the
// variables of macros, and it stays known how a name was written.
const (
	dollarPrefix = "d__"
	barePrefix   = "b__"
)

// occurrence is one rewritten name.
type occurrence struct {
	rewritten int // offset in the rewritten source, in runes, as cel-go counts
	original  int // offset in the original source, in bytes
}

// namespaces are the prefixes of CEL's own functions, as in `math.greatest(1, 2)`.
var namespaces = map[string]bool{"math": true, "lists": true, "sets": true, "strings": true, "base64": true, "cel": true, "optional": true}

// typeNames are CEL's type values, as in `type(x) == int`. `type` itself is not among them: a field of this name is
// far more likely than a comparison with the type of types.
var typeNames = map[string]bool{
	"bool": true, "bytes": true, "double": true, "int": true, "list": true, "map": true, "null_type": true, "string": true, "uint": true,
}

var literals = map[string]bool{"true": true, "false": true, "null": true, "in": true}

type rewriter struct {
	src  string
	pos  int
	out  strings.Builder
	runs int // runes written so far
	seen []occurrence
}

// rewrite gives the names of a CEL source their prefixes. Offsets of names are kept, so that errors can point into the original.
func rewrite(src string) (string, []occurrence, *Error) {
	r := &rewriter{src: src}
	for r.pos < len(src) {
		c := src[r.pos]
		switch {
		case c == '$':
			end := scanName(src, r.pos+1)
			if end == r.pos+1 {
				return "", nil, &Error{Offset: r.pos, Text: src, Message: "a `$` must be followed by a name"}
			}
			r.name(dollarPrefix, r.pos+1, end)
		case c == '"' || c == '\'':
			r.copyTo(scanString(src, r.pos, false))
		case c == '`':
			end := strings.IndexByte(src[r.pos+1:], '`')
			if end < 0 {
				r.copyTo(len(src))
			} else {
				r.copyTo(r.pos + 1 + end + 1)
			}
		case c == '/' && strings.HasPrefix(src[r.pos:], "//"):
			end := strings.IndexByte(src[r.pos:], '\n')
			if end < 0 {
				r.copyTo(len(src))
			} else {
				r.copyTo(r.pos + end)
			}
		case '0' <= c && c <= '9':
			r.copyTo(scanNumber(src, r.pos))
		case isNameStart(c):
			r.identifier()
		default:
			_, size := utf8.DecodeRuneInString(src[r.pos:])
			r.copyTo(r.pos + size)
		}
	}
	return r.out.String(), r.seen, nil
}

func (r *rewriter) copyTo(end int) {
	part := r.src[r.pos:end]
	r.out.WriteString(part)
	r.runs += utf8.RuneCountInString(part)
	r.pos = end
}

func (r *rewriter) name(prefix string, start, end int) {
	r.seen = append(r.seen, occurrence{rewritten: r.runs, original: r.pos})
	r.out.WriteString(prefix)
	r.runs += len(prefix)
	r.pos = start
	r.copyTo(end)
}

func (r *rewriter) identifier() {
	start, end := r.pos, scanName(r.src, r.pos)
	word := r.src[start:end]
	if end < len(r.src) && (r.src[end] == '"' || r.src[end] == '\'') && isStringPrefix(word) {
		r.copyTo(scanString(r.src, end, strings.ContainsAny(word, "rR")))
		return
	}
	next := skipSpace(r.src, end)
	follows := func(c byte) bool { return next < len(r.src) && r.src[next] == c }
	switch {
	case r.isField(start):
		if literals[word] { // a lexer keyword cannot be a field unless it is quoted
			r.out.WriteByte('`')
			r.copyTo(end)
			r.out.WriteByte('`')
			r.runs += 2
			return
		}
		r.copyTo(end)
	case literals[word], follows('('):
		r.copyTo(end)
	case typeNames[word] && !follows('.') && !follows('['):
		r.copyTo(end)
	case namespaces[word] && follows('.') && r.isCall(next+1):
		r.copyTo(end)
	default:
		r.name(barePrefix, start, end)
	}
}

// isField says that the name at i is selected from something, by `.` or `.?`.
func (r *rewriter) isField(i int) bool {
	before := strings.TrimRight(r.src[:i], " \t\r\n")
	return strings.HasSuffix(before, ".") || strings.HasSuffix(before, ".?")
}

// isCall says that a name followed by `(` starts at i.
func (r *rewriter) isCall(i int) bool {
	i = skipSpace(r.src, i)
	end := scanName(r.src, i)
	after := skipSpace(r.src, end)
	return end > i && after < len(r.src) && r.src[after] == '('
}

func isStringPrefix(word string) bool {
	switch strings.ToLower(word) {
	case "r", "b", "rb", "br":
		return true
	}
	return false
}

func skipSpace(s string, i int) int {
	for i < len(s) && strings.IndexByte(" \t\r\n", s[i]) >= 0 {
		i++
	}
	return i
}

// scanString returns the end of the CEL string literal whose opening quote is s[i]; the end of s if it is not closed.
func scanString(s string, i int, raw bool) int {
	quote := s[i : i+1]
	if triple := strings.Repeat(quote, 3); strings.HasPrefix(s[i:], triple) {
		quote = triple
	}
	i += len(quote)
	for i < len(s) {
		switch {
		case strings.HasPrefix(s[i:], quote):
			return i + len(quote)
		case s[i] == '\\' && !raw:
			i += 2
		default:
			i++
		}
	}
	return len(s)
}

// scanNumber returns the end of the number at i, with its exponent and suffix.
func scanNumber(s string, i int) int {
	hex := strings.HasPrefix(s[i:], "0x")
	for i < len(s) {
		switch {
		case isNamePart(s[i]):
			i++
			if !hex && (s[i-1] == 'e' || s[i-1] == 'E') && i < len(s) && (s[i] == '+' || s[i] == '-') {
				i++
			}
		case s[i] == '.' && i+1 < len(s) && '0' <= s[i+1] && s[i+1] <= '9':
			i++
		default:
			return i
		}
	}
	return i
}

// scanBraces returns the offset behind the `}` that closes the `{` at s[i], string literals inside skipped, and -1 if nothing closes it.
func scanBraces(s string, i int) int {
	depth := 0
	for i < len(s) {
		switch c := s[i]; {
		case c == '{':
			depth++
			i++
		case c == '}':
			depth--
			i++
			if depth == 0 {
				return i
			}
		case c == '"' || c == '\'':
			i = scanString(s, i, i > 0 && (s[i-1] == 'r' || s[i-1] == 'R'))
		default:
			i++
		}
	}
	return -1
}

package ddl

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec/ddl"
	"github.com/specql/mesh/test/pgtest"
)

// patterns makes regular expressions of every kind that is carried over.
type patterns struct{ *rand.Rand }

func (p patterns) pick(of ...string) string { return of[p.IntN(len(of))] }

func (p patterns) expression(depth int) string {
	if depth == 0 {
		return p.atom()
	}
	switch p.IntN(9) {
	case 0, 1, 2:
		return p.expression(depth-1) + p.expression(depth-1)
	case 3:
		return "(?:" + p.expression(depth-1) + "|" + p.expression(depth-1) + ")"
	case 4:
		return "(" + p.expression(depth-1) + ")" + p.pick("*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{0}", "{1,3}?")
	case 5:
		return "(?" + p.pick("i", "s", "m", "is", "U") + ":" + p.expression(depth-1) + ")"
	case 6:
		return p.pick("^", "$", `\b`, `\B`, `\A`, `\z`, "(?m:^)", "(?m:$)") + p.expression(depth-1)
	case 7:
		return p.expression(depth-1) + p.pick("^", "$", `\b`, `\B`, `\A`, `\z`, "(?m:^)", "(?m:$)")
	default:
		return p.atom()
	}
}

func (p patterns) atom() string {
	return p.pick("a", "b", "A", "_", "1", "-", `\.`, `\\`, "ä", "Ä", "k", "s", "é", `\n`, " ", "", ".", "[ab]", "[^ab]", `[\w-]`, `[^\W_]`, `\d`, `\D`, `\s`, `\S`,
		`\w`, `\W`, "[a-zä-ü]", `[^\n]`, "[[:alpha:]]", "[[:^digit:]]", `[\]^\\-]`, `[^\x{61}-\x{10FFFF}]`, `\x{1F600}`, `[K-s]`, "{", "}", `\t`)
}

func (p patterns) text() string {
	var b strings.Builder
	for range p.IntN(6) {
		b.WriteString(p.pick("a", "b", "A", "B", "_", "1", "-", ".", `\`, "ä", "Ä", "k", "K", "\u212a", "s", "ſ", "é", "\n", "\t", "\r", " ", "\u00a0", "٣", "😀", "{", "}", "]", "^", "'"))
	}
	return b.String()
}

// TestPatternsMatchTheSameTexts compares RE2 and PostgreSQL on random patterns and texts.
func TestPatternsMatchTheSameTexts(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	p := patterns{rand.New(rand.NewPCG(seed, 0))}
	type trial struct {
		pattern, translated, text string
		want                      bool
	}
	var trials []trial
	left := 0
	var script strings.Builder
	script.WriteString("CREATE TABLE trial (n serial, p text, s text);\n")
	for range 1500 {
		pattern := p.expression(1 + p.IntN(4))
		compiled, err := regexp.Compile(pattern)
		if err != nil {
			continue
		}
		translated, err := ddl.Pattern(pattern)
		if err != nil {
			left++
			continue
		}
		for range 12 {
			text := p.text()
			trials = append(trials, trial{pattern, translated, text, compiled.MatchString(text)})
			fmt.Fprintf(&script, "INSERT INTO trial (p, s) VALUES ($quoted$%s$quoted$, $quoted$%s$quoted$);\n", translated, text)
		}
	}
	require.Greater(t, len(trials), 6000)
	require.Less(t, left, 900, "most patterns are carried over")
	script.WriteString("SELECT s ~ p FROM trial ORDER BY n;\n")
	got := strings.Split(psql(t, url, "BEGIN;\n"+script.String()+"COMMIT;"), "\n")
	require.Len(t, got, len(trials))
	matches := 0
	for i, try := range trials {
		if try.want {
			matches++
		}
		require.Equal(t, try.want, got[i] == "t", "the pattern %q (here %q) on %q", try.pattern, try.translated, try.text)
	}
	require.Greater(t, matches, len(trials)/10)
}

// TestLargePatternsWorkWhenTheyAreUsed: PostgreSQL looks at a pattern when a row comes.
func TestLargePatternsWorkWhenTheyAreUsed(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	for _, pattern := range []string{
		`^(?:[a-z]{1,250}){1,3}$`, `^(?:(?:[a-zä-ü0-9_.]{1,30}-){1,30})$`, `(?i)^[a-z\p{Greek}]{250}$`, `^[^@\s]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,63}$`,
		strings.Repeat("(?:ab|cd)?", 200), "^" + strings.Repeat("x?", 240) + strings.Repeat("x", 240) + "$",
	} {
		translated, err := ddl.Pattern(pattern)
		require.NoError(t, err, pattern)
		psql(t, url, "SET statement_timeout = '30s'; SELECT repeat('x', n) ~ $quoted$"+translated+"$quoted$ FROM generate_series(1, 1000, 100) n")
	}
}

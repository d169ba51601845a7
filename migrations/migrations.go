// Package migrations holds the SQL that makes a PostgreSQL database ready, as one plain file for psql too.
package migrations

import (
	_ "embed"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// SQL is the whole schema: it makes an empty database ready, and upgrades one of any earlier version.
//
//go:embed 001_multi_execution.sql
var SQL string

// Version is one change to the schema that databases remember.
type Version struct {
	// Number counts from 1 without a gap.
	Number int
	Name   string
}

var (
	versionList = regexp.MustCompile(`(?s)INSERT INTO jobs\.tb_schema_version \(version, name\) VALUES\n(.*?)\nON CONFLICT DO NOTHING;\s*$`)
	versionLine = regexp.MustCompile(`^    \((\d+), '(\d{3}_[a-z0-9_]+)'\),?$`)
)

// Versions returns what the list at the end of SQL holds, in its order.
func Versions() ([]Version, error) {
	list := versionList.FindStringSubmatch(SQL)
	if list == nil {
		return nil, errors.New("the schema does not end with the list of its versions")
	}
	var all []Version
	for line := range strings.SplitSeq(list[1], "\n") {
		m := versionLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("versions of the schema: %q is no (number, 'name')", line)
		}
		number, err := strconv.Atoi(m[1])
		if want := len(all) + 1; err != nil || number != want || !strings.HasPrefix(m[2], fmt.Sprintf("%03d_", want)) {
			return nil, fmt.Errorf("versions of the schema: %q: want the number %d and a name that begins with %03d_", line, want, want)
		}
		all = append(all, Version{Number: number, Name: m[2]})
	}
	return all, nil
}

// space is what PostgreSQL skips between words.
const space = " \t\n\r\f\v"

// Statements splits a text into its statements, so that each can be a transaction of its own. It knows the
// quotes and comments of PostgreSQL; commands of psql (\set and the like) have no place in it.
func Statements(text string) ([]string, error) {
	var all []string
	begin, blank := 0, true
	for i := 0; i < len(text); {
		rest := text[i:]
		skip, what := 1, ""
		switch c := text[i]; {
		case strings.HasPrefix(rest, "--"):
			if skip = strings.IndexByte(rest, '\n'); skip < 0 {
				skip = len(rest)
			}
		case strings.HasPrefix(rest, "/*"):
			skip, what = comment(rest), "comment"
		case c == '\'':
			skip, what = quoted(rest, '\'', i > 0 && (text[i-1] == 'E' || text[i-1] == 'e') && (i < 2 || !isWord(text[i-2]))), "string"
			blank = false
		case c == '"':
			skip, what = quoted(rest, '"', false), "name"
			blank = false
		case c == '$' && (i == 0 || !isWord(text[i-1])):
			if tag := dollarTag(rest); tag != "" {
				what = "string " + tag
				if skip = strings.Index(rest[len(tag):], tag); skip >= 0 {
					skip += 2 * len(tag)
				}
			}
			blank = false
		case c == ';':
			if !blank {
				all = append(all, strings.Trim(text[begin:i], space))
			}
			begin, blank = i+1, true
		case strings.IndexByte(space, c) < 0:
			blank = false
		}
		if skip < 0 {
			return nil, fmt.Errorf("line %d: the %s does not end", 1+strings.Count(text[:i], "\n"), what)
		}
		i += skip
	}
	if !blank {
		return nil, errors.New("the last statement does not end with ;")
	}
	return all, nil
}

// comment is the length of a comment, which may hold others; -1 where it does not end.
func comment(text string) int {
	depth := 0
	for i := 0; i+1 < len(text); i++ {
		switch text[i : i+2] {
		case "/*":
			depth++
			i++
		case "*/":
			depth--
			i++
			if depth == 0 {
				return i + 1
			}
		}
	}
	return -1
}

// quoted is the length of a string or name in quotes; -1 where it does not end. A doubled quote is part of it.
func quoted(text string, quote byte, escapes bool) int {
	for i := 1; i < len(text); i++ {
		switch {
		case escapes && text[i] == '\\':
			i++
		case text[i] == quote && i+1 < len(text) && text[i+1] == quote:
			i++
		case text[i] == quote:
			return i + 1
		}
	}
	return -1
}

// dollarTag is the $tag$ that a text begins with; empty for none.
func dollarTag(text string) string {
	for i := 1; i < len(text); i++ {
		if text[i] == '$' {
			return text[:i+1]
		}
		if !isWord(text[i]) || i == 1 && text[i] >= '0' && text[i] <= '9' {
			return ""
		}
	}
	return ""
}

func isWord(c byte) bool {
	return c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= 0x80
}

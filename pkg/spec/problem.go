package spec

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Position is a place in a document. Line and Column count from 1, Column in characters; 0 is unknown.
type Position struct {
	File         string
	Line, Column int
}

// String gives "file:line:column".
func (p Position) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Problem is one thing that is wrong with a document.
type Problem struct {
	Position
	// Path is the place in the document, such as `services[0].operations[1].timeout`.
	Path string
	// Message says what is wrong, Mend how to put it right. Mend may be empty.
	Message, Mend string
	// Warning says that the document can be used all the same.
	Warning bool
}

// String gives "file:line:column: path: message; mend".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.Position.String())
	if p.Path != "" {
		b.WriteString(": ")
		b.WriteString(p.Path)
	}
	b.WriteString(": ")
	b.WriteString(p.Message)
	if p.Mend != "" {
		b.WriteString("; ")
		b.WriteString(p.Mend)
	}
	return b.String()
}

// Problems are all that is wrong with one or more documents.
type Problems []Problem

// Sort orders problems by file, line, column, path and message.
func (ps Problems) Sort() {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(
			cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			cmp.Compare(a.Path, b.Path), cmp.Compare(a.Message, b.Message),
		)
	})
}

// HasErrors says whether any problem is more than a warning.
func (ps Problems) HasErrors() bool {
	return slices.ContainsFunc(ps, func(p Problem) bool { return !p.Warning })
}

// Err returns an *InvalidError with the problems, and nil if there are none but warnings.
func (ps Problems) Err() error {
	if !ps.HasErrors() {
		return nil
	}
	return &InvalidError{Problems: ps}
}

// InvalidError says that a document cannot be used.
type InvalidError struct{ Problems Problems }

// Error lists the errors, one a line, without the warnings.
func (e *InvalidError) Error() string {
	lines := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		if !p.Warning {
			lines = append(lines, p.String())
		}
	}
	return strings.Join(lines, "\n")
}

// collector gathers problems while a document is read.
type collector struct {
	problems    Problems
	strict      bool
	full        bool
	suggestions int // made so far
	expressions int // compiled so far
}

func (c *collector) add(p Problem) {
	if c.full {
		return
	}
	if len(c.problems) >= maxProblems {
		c.full = true
		c.problems = append(c.problems, Problem{
			Position: p.Position, Message: fmt.Sprintf("there are more than %d problems, the rest is not shown", maxProblems),
		})
		return
	}
	if c.strict {
		p.Warning = false
	}
	c.problems = append(c.problems, p)
}

func (c *collector) errorf(at Position, path, mend, format string, args ...any) {
	c.add(Problem{Position: at, Path: path, Message: fmt.Sprintf(format, args...), Mend: mend})
}

func (c *collector) warnf(at Position, path, mend, format string, args ...any) {
	c.add(Problem{Position: at, Path: path, Message: fmt.Sprintf(format, args...), Mend: mend, Warning: true})
}

// sorted gives the problems in order, equal ones once.
func (c *collector) sorted() Problems {
	c.problems.Sort()
	return slices.Compact(c.problems)
}

// DidYouMean returns the candidate that name was probably meant to be, and "" if none is near.
func DidYouMean(name string, candidates []string) string {
	if name == "" || len(name) > 2*maxNameBytes {
		return ""
	}
	lower := strings.ToLower(name)
	best, bestDistance := "", max(1, len(lower)/3)+1
	for _, candidate := range candidates {
		if candidate == "" || len(candidate) > 2*maxNameBytes || max(len(name)-len(candidate), len(candidate)-len(name)) > 4*bestDistance {
			continue
		}
		d := distance(lower, strings.ToLower(candidate))
		if d < bestDistance || d == bestDistance && best != "" && candidate < best {
			best, bestDistance = candidate, d
		}
	}
	return best
}

// distance is the number of characters to insert, delete, change or swap with the next one, to make b of a.
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	var before []int
	row := make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(x); i++ {
		next := make([]int, len(y)+1)
		next[0] = i
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			next[j] = min(row[j]+1, next[j-1]+1, row[j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				next[j] = min(next[j], before[j-2]+1)
			}
		}
		before, row = row, next
	}
	return row[len(y)]
}

// suggest is the mend for an unknown name. Nearness takes time to compute, so a document full of unknown names gets no more than some.
func (c *collector) suggest(name string, candidates []string) string {
	if c.suggestions++; c.suggestions > maxSuggestions {
		return ""
	}
	return suggest(name, candidates)
}

// suggest is the mend for an unknown name.
func suggest(name string, candidates []string) string {
	if found := DidYouMean(name, candidates); found != "" {
		return fmt.Sprintf("did you mean %q?", found)
	}
	if len(candidates) == 0 {
		return ""
	}
	if len(candidates) > 20 {
		candidates = candidates[:20]
	}
	return "there are: " + strings.Join(candidates, ", ")
}

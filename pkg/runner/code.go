package runner

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

// codeOption says which options of an interpreter bring code with them.
type codeOption struct {
	names *regexp.Regexp
	// letters of short options, alone or at the end of a cluster such as -lc.
	letters string
	// long options, as --eval CODE and --eval=CODE.
	long []string
	// values are the letters of short options that take the argument after them.
	values string
	// later: the code is the first argument after all options, as in a shell.
	later bool
}

var interpreters = []codeOption{
	{names: regexp.MustCompile(`^(ba|da|z|k|mk|a|fi)?sh[0-9.]*$`), letters: "c", values: "oO", later: true},
	{names: regexp.MustCompile(`^(python|pypy)[0-9.]*$`), letters: "c", values: "WX"},
	{names: regexp.MustCompile(`^node(js)?[0-9.]*$`), letters: "ep", long: []string{"--eval", "--print"}, values: "rC"},
	{names: regexp.MustCompile(`^perl[0-9.]*$`), letters: "eE"},
	{names: regexp.MustCompile(`^ruby[0-9.]*$`), letters: "e", values: "rIEC"},
}

// wrappers run the program that their arguments name.
var wrappers = []string{
	"env", "busybox", "toybox", "nice", "ionice", "nohup", "setsid", "stdbuf", "timeout", "time", "exec", "chroot",
	"tini", "dumb-init", "catatonit", "gosu", "su-exec", "sudo", "setpriv", "xargs", "unshare", "flock",
}

// CodeArguments gives the positions of the arguments that a known interpreter would run as
// code: what follows -c of a shell or of Python, -e of Node, Perl and Ruby. What a caller
// sends must not get in there: it would be run.
func CodeArguments(argv []string) []int {
	if len(argv) == 0 {
		return nil
	}
	if i := interpreter(argv[0]); i != nil {
		return i.code(argv, 1)
	}
	if !slices.Contains(wrappers, strings.TrimSuffix(path.Base(argv[0]), "-static")) {
		return nil
	}
	for at, arg := range argv[1:] {
		if i := interpreter(arg); i != nil {
			return i.code(argv, at+2)
		}
		// env -S 'sh -c code' splits one argument into several.
		if words := strings.Fields(arg); len(words) > 1 && slices.ContainsFunc(words, func(w string) bool { return interpreter(w) != nil }) {
			return []int{at + 1}
		}
	}
	return nil
}

func interpreter(program string) *codeOption {
	name := path.Base(program)
	for i := range interpreters {
		if interpreters[i].names.MatchString(name) {
			return &interpreters[i]
		}
	}
	return nil
}

// code looks at the options from a position on.
func (o *codeOption) code(argv []string, from int) []int {
	var found []int
	brought := false
	for i := from; i < len(argv); i++ {
		arg := argv[i]
		if arg == "--" || len(arg) < 2 || arg[0] != '-' && (!o.later || arg[0] != '+') {
			if !o.later || !brought {
				return found
			}
			if arg != "--" {
				return append(found, i)
			}
			if i+1 < len(argv) {
				found = append(found, i+1)
			}
			return found
		}
		if strings.HasPrefix(arg, "--") {
			name, _, joined := strings.Cut(arg, "=")
			if slices.Contains(o.long, name) {
				if joined {
					found = append(found, i)
				} else if i+1 < len(argv) {
					i++
					found = append(found, i)
				}
			}
			continue
		}
		at := strings.IndexAny(arg[1:], o.letters) + 1
		switch {
		case o.later:
			brought = brought || at > 0 && arg[0] == '-'
			if strings.ContainsAny(arg[len(arg)-1:], o.values) {
				i++
			}
		case at > 0:
			if at < len(arg)-1 {
				found = append(found, i) // the code may be joined to its option
			}
			if i+1 < len(argv) && strings.ContainsAny(arg[len(arg)-1:], o.letters) {
				found = append(found, i+1)
				if !strings.HasPrefix(argv[i+1], "-") {
					i++
				}
			}
		case o.values != "" && len(arg) == 2 && strings.Contains(o.values, arg[1:]):
			i++
		}
	}
	return found
}

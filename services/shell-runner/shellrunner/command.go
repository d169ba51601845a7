package shellrunner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// interpreter runs the scripts of an ending. Names match the base name of an allowed command,
// as it is listed or as it resolves; the first pattern that any matches decides.
type interpreter struct {
	ending string
	names  []*regexp.Regexp
	listed string // what to write into allowed_commands
}

// interpreters in the order in which a script named after its operation is looked for.
func interpreters() []interpreter {
	node := []*regexp.Regexp{regexp.MustCompile(`^node(js)?[0-9.]*$`)}
	return []interpreter{
		{".py", []*regexp.Regexp{regexp.MustCompile(`^python[0-9.]*$`)}, "/usr/bin/python3"},
		{".js", node, "/usr/bin/node"},
		{".mjs", node, "/usr/bin/node"},
		{".sh", []*regexp.Regexp{regexp.MustCompile(`^bash$`), regexp.MustCompile(`^(da)?sh$`)}, "/usr/bin/bash"},
		{".rb", []*regexp.Regexp{regexp.MustCompile(`^ruby[0-9.]*$`)}, "/usr/bin/ruby"},
		{".pl", []*regexp.Regexp{regexp.MustCompile(`^perl[0-9.]*$`)}, "/usr/bin/perl"},
	}
}

// command is what will be executed: checked, every link resolved.
type command struct {
	path string   // of the file that the kernel opens
	argv []string // argv[0] is the listed name, by which programs with many names tell what they are
	dir  string
	// script is the file that an interpreter gets; empty for none.
	script string
	// programs are all that may be executed.
	programs []sandbox.Program
}

// resolver finds a job's command and holds it to the policy, noting each check.
type resolver struct {
	policy  Policy
	ceiling *Policy
	checks  *runner.Checks
	scripts []interpreter
	paths   map[string]string // resolved before, for this job
}

// resolve gives the command of an operation.
func (r *resolver) resolve(cfg Config, name string, op Operation, input any) (*command, error) {
	dir, err := r.directory(cfg.WorkingDirectory)
	if err != nil {
		return nil, err
	}
	var cmd *command
	switch {
	case len(op.Command) > 0 && op.Script != "":
		return nil, fault.New(fault.Validation, "the operation has both command and script; keep one of them")
	case len(op.Command) > 0:
		cmd, err = r.fromCommand(op.Command, input)
	case cfg.WorkingDirectory == "":
		return nil, fault.New(fault.Validation, "the operation says neither command nor script, and there is no working_directory to look for a file named %q in; add one of them", clip(name))
	case op.Script != "":
		cmd, err = r.fromScript(dir, op.Script)
	default:
		var script string
		if script, err = r.find(dir, name); err == nil {
			cmd, err = r.fromScript(dir, script)
		}
	}
	if err != nil {
		return nil, err
	}
	cmd.dir, cmd.programs = dir, r.programs()
	return cmd, nil
}

// programs are the allowed commands that are there, each with its place.
func (r *resolver) programs() []sandbox.Program {
	var ceiling []string
	if r.ceiling != nil && r.ceiling.AllowedCommands != nil {
		ceiling = []string{}
		for _, entry := range r.ceiling.AllowedCommands {
			ceiling = append(ceiling, resolved(entry))
		}
	}
	var all []sandbox.Program
	for _, entry := range r.policy.AllowedCommands {
		path := r.resolved(entry)
		if path == "\x00" || ceiling != nil && !slices.Contains(ceiling, path) {
			continue
		}
		all = append(all, sandbox.Program{Listed: filepath.Clean(entry), Path: path})
	}
	return all
}

// reserved are directories that are a sandbox's own.
var reserved = []string{"/proc", "/sys", "/dev"}

// directory resolves the working directory; it is empty where none is configured, which means
// the private temporary directory.
func (r *resolver) directory(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	if !filepath.IsAbs(path) {
		return "", fault.New(fault.Validation, "working_directory %q is relative; write an absolute path, or ${NAME} for one from the environment", clip(path))
	}
	dir, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fault.Wrap(err, fault.Validation, "working_directory %q cannot be used: %s", clip(path), reason(err))
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return "", fault.New(fault.Validation, "working_directory %q is not a directory", clip(path))
	}
	if dir == "/" || slices.ContainsFunc(reserved, func(top string) bool { return within(top, dir) }) {
		return "", fault.New(fault.Validation, "working_directory %q cannot be given to a job; choose a directory of files", clip(path))
	}
	for rule, allowed := range r.lists("working_directory_restrictions", func(p *Policy) []string { return p.WorkingDirectoryRestrictions }) {
		if allowed == nil {
			continue
		}
		if !slices.ContainsFunc(allowed, func(top string) bool { return within(resolved(top), dir) }) {
			return "", r.checks.Deny(rule, dir, fmt.Sprintf("it is below none of %s; add %q", list(allowed), dir),
				r.adding("working_directory_restrictions", dir, func(allowed []string) bool {
					return slices.ContainsFunc(allowed, func(top string) bool { return within(resolved(top), dir) })
				})...)
		}
		r.checks.Allow(rule, dir)
	}
	return dir, nil
}

// lists yields a list of the registry's policy and of the ceiling, each under the name of its rule.
func (r *resolver) lists(rule string, of func(*Policy) []string) func(func(string, []string) bool) {
	return func(yield func(string, []string) bool) {
		if yield(rule, of(&r.policy)) && r.ceiling != nil {
			yield("ceiling."+rule, of(r.ceiling))
		}
	}
}

// adding are the changes of both policies that put an entry into their lists, of those that do not
// allow it. A list that the operator has not made allows all.
func (r *resolver) adding(rule, entry string, allows func([]string) bool) []*runnerv1.PolicyChange {
	of := map[string]func(*Policy) []string{
		"allowed_commands":               func(p *Policy) []string { return p.AllowedCommands },
		"working_directory_restrictions": func(p *Policy) []string { return p.WorkingDirectoryRestrictions },
	}[rule]
	var changes []*runnerv1.PolicyChange
	for name, allowed := range r.lists(rule, of) {
		ceiling := name != rule
		if allowed == nil && (ceiling || rule != "allowed_commands") || allows(allowed) {
			continue
		}
		changes = append(changes, runner.AddTo(ceiling, rule, entry))
	}
	return changes
}

func (r *resolver) addingCommand(path string) []*runnerv1.PolicyChange {
	return r.adding("allowed_commands", path, func(allowed []string) bool {
		target := resolved(path)
		return slices.ContainsFunc(allowed, func(entry string) bool { return entry == path || target != "\x00" && resolved(entry) == target })
	})
}

func (r *resolver) fromCommand(argv []string, input any) (*command, error) {
	filled := make([]string, len(argv))
	for i, arg := range argv {
		text, err := fill(arg, input)
		if err != nil {
			return nil, at(fmt.Sprintf("command[%d]", i), err)
		}
		filled[i] = text
	}
	name := filled[0]
	if name == "" {
		return nil, fault.New(fault.Validation, "command[0] is empty; write the absolute path of a program")
	}
	if !strings.Contains(name, "/") {
		// A bare name picks one of the allowed commands and can be nothing else.
		at := slices.IndexFunc(r.policy.AllowedCommands, func(p string) bool { return filepath.Base(p) == name })
		if at < 0 {
			return nil, r.checks.Deny("allowed_commands", clip(name), fmt.Sprintf("%s; add the absolute path of %s", r.none("no command of this name is allowed"), clip(name)))
		}
		name = r.policy.AllowedCommands[at]
	}
	if !filepath.IsAbs(name) {
		return nil, fault.New(fault.Validation, "command[0] %q is a relative path; write an absolute one", clip(name))
	}
	path, listed, err := r.allow(name)
	if err != nil {
		return nil, err
	}
	for _, program := range []string{name, listed, path} {
		filled[0] = program
		for _, i := range runner.CodeArguments(filled) {
			if refers(argv[i]) {
				message, mend := inputInCode(argv[i])
				return nil, fault.New(fault.Validation, "command[%d]: %s; %s", i, message, mend)
			}
		}
	}
	filled[0] = listed
	return &command{path: path, argv: filled}, nil
}

// inputInCode says why an argument is refused that an interpreter runs as code.
func inputInCode(arg string) (message, mend string) {
	return fmt.Sprintf("%q puts the input into code, where a caller could send code of its own", clip(arg)),
		`pass the reference as an argument after the code, and read it there as an argument: "$1" in a shell (whose first argument after the code is $0), sys.argv in Python, process.argv in Node, ARGV in Perl and Ruby`
}

// allow resolves a program's path and compares it with the allowed commands, resolved as well.
// listed is the name that the policy gives it.
func (r *resolver) allow(name string) (path, listed string, err error) {
	path, err = filepath.EvalSymlinks(name)
	if err != nil {
		detail := fmt.Sprintf("the command %q cannot be run: %s", clip(name), reason(err))
		if mend := r.instead(name); mend != "" {
			detail += "; " + mend
		}
		// Whether a file exists is told of allowed paths only.
		if !slices.Contains(r.policy.AllowedCommands, name) {
			return "", "", r.checks.Deny("allowed_commands", clip(name), r.none("it is not listed")+fmt.Sprintf("; add %q", clip(name)), r.addingCommand(name)...)
		}
		return "", "", fault.Wrap(err, fault.Validation, "%s", detail)
	}
	for rule, allowed := range r.lists("allowed_commands", func(p *Policy) []string { return p.AllowedCommands }) {
		if allowed == nil && rule != "allowed_commands" {
			continue // the operator does not narrow it
		}
		match := ""
		for _, entry := range allowed {
			if entry == name || match == "" {
				if r.resolved(entry) == path {
					match = entry
				}
			}
		}
		if match == "" {
			return "", "", r.checks.Deny(rule, path, r.none("it is not listed")+fmt.Sprintf("; add %q", path), r.addingCommand(path)...)
		}
		if listed == "" {
			listed = match
		}
		r.checks.Allow(rule, path)
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", "", fault.Wrap(err, fault.Validation, "the command %q cannot be run: %s", clip(name), reason(err))
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return "", "", fault.New(fault.Validation, "the command %q is not an executable file", clip(name))
	}
	return path, listed, nil
}

// none completes a refusal where the policy allows nothing at all.
func (r *resolver) none(otherwise string) string {
	if len(r.policy.AllowedCommands) == 0 {
		return "no allowed_commands are listed, so nothing may run"
	}
	return otherwise
}

// instead names a program that is there in place of one that is not. Only the author can
// allow it.
func (r *resolver) instead(name string) string {
	for _, s := range r.scripts {
		if matches(s.names, filepath.Base(name)) && s.listed != name {
			if _, err := os.Stat(s.listed); err == nil {
				return fmt.Sprintf("this machine has %s: add %q to allowed_commands", s.listed, s.listed)
			}
		}
	}
	return ""
}

// fromScript gives the command of a script below the working directory.
func (r *resolver) fromScript(dir, script string) (*command, error) {
	if filepath.IsAbs(script) || strings.ContainsRune(script, 0) {
		return nil, fault.New(fault.Validation, "script %q must be a path below working_directory", clip(script))
	}
	path, err := filepath.EvalSymlinks(filepath.Join(dir, script))
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "script %q in working_directory cannot be run: %s", clip(script), reason(err))
	}
	if !within(dir, path) {
		return nil, r.checks.Deny("working_directory", path, fmt.Sprintf("script %q leads out of working_directory %s", clip(script), dir))
	}
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil, fault.New(fault.Validation, "script %q is not a file", clip(script))
	}
	ending := filepath.Ext(script)
	for _, s := range r.scripts {
		if s.ending == ending {
			return r.interpreted(s, path)
		}
	}
	if ending != "" {
		return nil, fault.New(fault.Validation, "script %q: no interpreter is known for %q; the endings known are %s", clip(script), clip(ending), endings(r.scripts))
	}
	// It runs itself, so that it must be allowed itself.
	path, listed, err := r.allow(path)
	if err != nil {
		return nil, err
	}
	return &command{path: path, argv: []string{listed}}, nil
}

// interpreted finds the allowed interpreter of a script.
func (r *resolver) interpreted(s interpreter, script string) (*command, error) {
	var missing string
	for _, pattern := range s.names {
		for _, entry := range r.policy.AllowedCommands {
			real, err := filepath.EvalSymlinks(entry)
			if err != nil {
				if pattern.MatchString(filepath.Base(entry)) {
					missing = entry
				}
				continue
			}
			if pattern.MatchString(filepath.Base(entry)) || pattern.MatchString(filepath.Base(real)) {
				path, listed, err := r.allow(entry)
				if err != nil {
					return nil, err
				}
				return &command{path: path, argv: []string{listed, script}, script: script}, nil
			}
		}
	}
	if missing != "" {
		text := fmt.Sprintf("the command %q does not exist on this machine", missing)
		if mend := r.instead(missing); mend != "" {
			text += "; " + mend
		}
		return nil, fault.New(fault.Validation, "%s", text)
	}
	return nil, r.checks.Deny("allowed_commands", script, r.none("none of them is an interpreter of "+s.ending+" files")+fmt.Sprintf("; add %q", s.listed), r.addingCommand(s.listed)...)
}

// find looks for the one file named after an operation.
func (r *resolver) find(dir, operation string) (string, error) {
	if operation == "" || operation != filepath.Base(operation) || strings.HasPrefix(operation, ".") || strings.ContainsRune(operation, 0) {
		return "", fault.New(fault.Validation, "no file can be named after the operation %q; add command or script", clip(operation))
	}
	var found []string
	for _, s := range r.scripts {
		if info, err := os.Stat(filepath.Join(dir, operation+s.ending)); err == nil && info.Mode().IsRegular() {
			found = append(found, operation+s.ending)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, operation)); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
		found = append(found, operation)
	}
	switch len(found) {
	case 0:
		return "", fault.New(fault.Validation, "working_directory %s has no file named after the operation %q; add %s%s, or say command or script", dir, operation, operation, endings(r.scripts))
	case 1:
		return found[0], nil
	}
	return "", fault.New(fault.Validation, "working_directory %s has several files named after the operation %q: %s; say which one with script", dir, operation, strings.Join(found, ", "))
}

func endings(scripts []interpreter) string {
	var all []string
	for _, s := range scripts {
		all = append(all, s.ending)
	}
	return strings.Join(all, " ")
}

func matches(patterns []*regexp.Regexp, name string) bool {
	return slices.ContainsFunc(patterns, func(p *regexp.Regexp) bool { return p.MatchString(name) })
}

// resolved is [resolved], once for each path.
func (r *resolver) resolved(path string) string {
	real, ok := r.paths[path]
	if !ok {
		real = resolved(path)
		if r.paths == nil {
			r.paths = map[string]string{}
		}
		r.paths[path] = real
	}
	return real
}

// resolved is a path without links, or a value that equals none where it does not exist.
func resolved(path string) string {
	real, err := filepath.EvalSymlinks(path)
	if err != nil || !filepath.IsAbs(path) {
		return "\x00"
	}
	return real
}

// within tells whether path is top or lies below it; both are resolved.
func within(top, path string) bool {
	rel, err := filepath.Rel(top, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// reason is an error of the file system in a few words.
func reason(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "it does not exist"
	case errors.Is(err, fs.ErrPermission):
		return "permission denied"
	}
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}

func list(paths []string) string {
	quoted := make([]string, len(paths))
	for i, p := range paths {
		quoted[i] = fmt.Sprintf("%q", p)
	}
	return "[" + clip(strings.Join(quoted, ", ")) + "]"
}

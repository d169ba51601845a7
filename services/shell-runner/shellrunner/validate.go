package shellrunner

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/runner"
)

// Validate implements [runner.JobRunner]. What depends on the files of this machine is a
// warning: the job may be meant for another.
func (r *Runner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	v := &validation{
		r: r, cfg: runner.Lenient[Config](s.Config), policy: runner.Lenient[Policy](s.Policy),
		found: runner.CheckService[Config, Operation, Policy](s),
	}
	v.config()
	v.policyLists()
	v.enforcement()
	for _, o := range s.Operations {
		v.operation(o.Name, runner.Lenient[Operation](o.Config))
	}
	return runner.AppendProblems(v.found, v.problems...), nil
}

type validation struct {
	r        *Runner
	cfg      Config
	policy   Policy
	found    []runner.Problem // against the schemas
	problems []runner.Problem
}

// garbled tells whether a key is not as it was meant, so that its value says nothing: it, what
// it is in, or something in it has the wrong type, or another key was probably meant to be it.
func (v *validation) garbled(section, key string) bool {
	path := section + "." + key
	return slices.ContainsFunc(v.found, func(p runner.Problem) bool {
		return p.Path == section || p.Path == path || strings.HasPrefix(p.Path, path+"[") || strings.HasPrefix(p.Path, path+".") ||
			strings.HasPrefix(p.Path, section+".") && p.Mend == fmt.Sprintf("did you mean %q?", key)
	})
}

// noneAllowed tells whether no allowed command fits, of what is known of them.
func (v *validation) noneAllowed(fits func(entry string) bool) bool {
	return !v.garbled("security_policy", "allowed_commands") && !slices.ContainsFunc(v.policy.AllowedCommands, fits)
}

func (v *validation) add(path, message, mend string) {
	v.problems = append(v.problems, runner.Problem{Path: path, Message: message, Mend: mend})
}

func (v *validation) warn(path, message, mend string) {
	v.problems = append(v.problems, runner.Problem{Path: path, Message: message, Mend: mend, Warning: true})
}

func (v *validation) config() {
	const path = "runner_config.working_directory"
	dir := v.cfg.WorkingDirectory
	switch {
	case dir == "":
	case !filepath.IsAbs(dir):
		v.add(path, fmt.Sprintf("%q is a relative path", clip(dir)), "write an absolute path, or ${NAME} for one from the environment")
	default:
		real := filepath.Clean(dir)
		if found, err := filepath.EvalSymlinks(dir); err == nil {
			real = found
		} else {
			v.warn(path, fmt.Sprintf("%q cannot be used on this machine: %s", clip(dir), reason(err)), "make the directory where the runner runs")
		}
		if tops := v.policy.WorkingDirectoryRestrictions; tops != nil && !slices.ContainsFunc(tops, func(top string) bool {
			return within(filepath.Clean(top), real) || within(resolved(top), real)
		}) {
			v.warn(path, fmt.Sprintf("%s is below none of working_directory_restrictions %s", real, list(tops)), fmt.Sprintf("add %q there", real))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(v.cfg.Environment)) {
		if message, mend := checkVariable(name, string(v.cfg.Environment[name])); message != "" {
			v.add("runner_config.environment."+clip(name), message, mend)
		}
	}
}

func (v *validation) policyLists() {
	if len(v.policy.AllowedCommands) == 0 && !v.garbled("security_policy", "allowed_commands") {
		v.warn("security_policy.allowed_commands", "no command is allowed, so nothing may run", `add allowed_commands: ["/usr/bin/python3"], with the programs that this service needs`)
	}
	for i, entry := range v.policy.AllowedCommands {
		path := fmt.Sprintf("security_policy.allowed_commands[%d]", i)
		if !filepath.IsAbs(entry) {
			v.add(path, fmt.Sprintf("%q is not an absolute path", clip(entry)), "write the whole path, such as /usr/bin/python3")
			continue
		}
		info, err := os.Stat(entry)
		switch {
		case err != nil:
			mend := (&resolver{scripts: v.r.scripts}).instead(entry)
			if mend == "" {
				mend = "install it where the runner runs, or correct the path"
			}
			v.warn(path, fmt.Sprintf("%q cannot be run on this machine: %s", clip(entry), reason(err)), mend)
		case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
			v.warn(path, fmt.Sprintf("%q is not an executable file on this machine", clip(entry)), "name a program, not a directory")
		}
	}
	for i, entry := range v.policy.WorkingDirectoryRestrictions {
		if !filepath.IsAbs(entry) {
			v.add(fmt.Sprintf("security_policy.working_directory_restrictions[%d]", i), fmt.Sprintf("%q is not an absolute path", clip(entry)), "write the whole path")
		}
	}
}

// enforcement says which parts of the policy do not hold here.
func (v *validation) enforcement() {
	if v.policy.NetworkAccess == networkLocalhost && v.r.noLoop != nil {
		v.warn("security_policy.network_access", "localhost is refused on this machine: "+v.r.noLoop.Error(), "write none, or run the runner as root or with CAP_SYS_ADMIN")
	}
	if (v.policy.NetworkAccess == networkNone || v.policy.NetworkAccess == "") && v.r.noNet != nil && !v.r.box.holdsSockets() {
		v.warn("security_policy.network_access", "none is not enforced on this machine: "+v.r.noNet.Error(), "run the runner as root or with CAP_SYS_ADMIN")
	}
	if f := v.policy.FileAccess; (f == fileNone || f == fileRead) && !v.r.box.holdsFiles() {
		v.warn("security_policy.file_access", f+" is not enforced on this machine, which has neither name spaces nor Landlock: the command writes what the runner's user may write",
			"use the docker execution type to shut files off")
	}
}

func (v *validation) operation(name string, op Operation) {
	path := "operations." + clip(name)
	switch {
	case len(op.Command) > 0 && op.Script != "":
		v.add(path+".script", "the operation has both command and script", "keep one of them")
	case len(op.Command) > 0:
		v.command(path+".command", op.Command)
	case op.Script == "" && (v.garbled(path, "command") || v.garbled(path, "script")):
		// Nothing can be said of what was meant.
	case v.cfg.WorkingDirectory == "" && v.garbled("runner_config", "working_directory"):
	case v.cfg.WorkingDirectory == "":
		v.add(path, "the operation says neither command nor script, and there is no working_directory to look for a file named after it", "add command, or runner_config.working_directory")
	case op.Script != "":
		v.script(path+".script", op.Script)
	default:
		dir, err := filepath.EvalSymlinks(v.cfg.WorkingDirectory)
		if err != nil {
			return // said already
		}
		r := &resolver{scripts: v.r.scripts}
		script, err := r.find(dir, name)
		if err != nil {
			v.warn(path, strings.TrimPrefix(err.Error(), "VALIDATION: "), "")
			return
		}
		v.interpreter(path, filepath.Ext(script))
	}
}

func (v *validation) command(path string, argv []string) {
	for i, arg := range argv {
		if _, err := parseArgument(arg); err != nil {
			v.add(fmt.Sprintf("%s[%d]", path, i), err.Error(), "write $input.field or $input.list[0]")
		}
		if strings.ContainsRune(arg, 0) {
			v.add(fmt.Sprintf("%s[%d]", path, i), "a NUL character cannot be in an argument", "remove it")
		}
	}
	v.code(path, argv)
	name := argv[0]
	pieces, err := parseArgument(name)
	if err != nil || slices.ContainsFunc(pieces, func(p piece) bool { return p.ref }) {
		return // decided at each call, by the policy
	}
	switch {
	case name == "":
		v.add(path+"[0]", "the program is empty", "write the absolute path of a program")
	case !strings.Contains(name, "/"):
		if v.noneAllowed(func(p string) bool { return filepath.Base(p) == name }) {
			v.warn(path+"[0]", fmt.Sprintf("no command named %q is in allowed_commands", clip(name)), "add the absolute path of "+clip(name)+" there")
		}
	case !filepath.IsAbs(name):
		v.add(path+"[0]", fmt.Sprintf("%q is a relative path", clip(name)), "write an absolute path, or a script")
	default:
		real := resolved(name)
		if v.noneAllowed(func(p string) bool { return p == name || real != "\x00" && resolved(p) == real }) {
			v.warn(path+"[0]", fmt.Sprintf("%q is not in allowed_commands", clip(name)), fmt.Sprintf("add %q there", clip(name)))
		}
	}
}

// code finds references to the input in what an interpreter runs as code.
func (v *validation) code(path string, argv []string) {
	programs := []string{argv[0]}
	for _, p := range v.policy.AllowedCommands {
		if filepath.Base(p) == argv[0] || p == argv[0] {
			programs = append(programs, p, resolved(p))
		}
	}
	reported := map[int]bool{}
	for _, program := range programs {
		for _, i := range runner.CodeArguments(append([]string{program}, argv[1:]...)) {
			if !reported[i] && refers(argv[i]) {
				reported[i] = true
				message, mend := inputInCode(argv[i])
				v.add(fmt.Sprintf("%s[%d]", path, i), message, mend)
			}
		}
	}
}

func (v *validation) script(path, script string) {
	if !filepath.IsLocal(script) {
		v.add(path, fmt.Sprintf("%q must be a path below working_directory", clip(script)), "move the file there and name it without .. or a leading slash")
		return
	}
	if dir, err := filepath.EvalSymlinks(v.cfg.WorkingDirectory); err == nil {
		if _, err := os.Stat(filepath.Join(dir, script)); err != nil {
			v.warn(path, fmt.Sprintf("%q cannot be run on this machine: %s", clip(script), reason(err)), "add the file to working_directory")
		}
	}
	v.interpreter(path, filepath.Ext(script))
}

func (v *validation) interpreter(path, ending string) {
	if ending == "" {
		return // it runs itself, and is compared with allowed_commands then
	}
	for _, s := range v.r.scripts {
		if s.ending != ending {
			continue
		}
		if v.noneAllowed(func(p string) bool {
			return matches(s.names, filepath.Base(p)) || matches(s.names, filepath.Base(resolved(p)))
		}) {
			v.warn(path, fmt.Sprintf("no interpreter of %s files is in allowed_commands", ending), fmt.Sprintf("add %q there", s.listed))
		}
		return
	}
	v.add(path, fmt.Sprintf("no interpreter is known for %q", clip(ending)), "the endings known are "+endings(v.r.scripts))
}

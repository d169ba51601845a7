package pgtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// tools are the programs of one installation and the user who may run them.
type tools struct {
	bin        string
	credential *syscall.Credential // nil for the process's own user
}

func (t *tools) path(program string) string { return filepath.Join(t.bin, program) }

var errMissing = errors.New("PostgreSQL is not installed: these tests need its programs initdb, postgres and psql" +
	" (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql)")

// findTools finds the programs: in the path, where Debian puts them (the highest version first), where pg_config says.
func findTools() (*tools, error) {
	var candidates []string
	if p, err := exec.LookPath("initdb"); err == nil {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			p = real
		}
		candidates = append(candidates, filepath.Dir(p))
	}
	versions, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return nil, err
	}
	slices.SortFunc(versions, func(a, b string) int { return version(b) - version(a) })
	candidates = append(candidates, versions...)
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		candidates = append(candidates, strings.TrimSpace(string(out)))
	}
	for _, dir := range candidates {
		if complete(dir) {
			t := &tools{bin: dir}
			return t, t.findUser()
		}
	}
	return nil, errMissing
}

// version is the number in /usr/lib/postgresql/15/bin; 0 for none.
func version(dir string) int {
	v, err := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
	if err != nil {
		return 0
	}
	return v
}

// complete reports whether a folder holds the programs needed.
func complete(dir string) bool {
	for _, program := range []string{"initdb", "postgres", "psql"} {
		if _, err := os.Stat(filepath.Join(dir, program)); err != nil {
			return false
		}
	}
	return true
}

// findUser takes the user postgres where the process is root's, for whom the server refuses to run.
func (t *tools) findUser() error {
	if os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return fmt.Errorf("PostgreSQL does not run as root, and there is no user postgres to run it as: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return err
	}
	t.credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	return nil
}

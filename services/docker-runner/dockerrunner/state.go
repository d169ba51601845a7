package dockerrunner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stateDir is where a runner keeps a directory for the output of each running job:
// <root>/<instance>/<random>. The file owner in an instance's directory tells whose it is.
type stateDir struct {
	root string
	who  owner

	mu   sync.Mutex
	made bool
}

func newStateDir(root string, who owner) *stateDir {
	switch {
	case root != "":
	case os.Getuid() == 0:
		root = "/run/specql-docker"
	default:
		root = filepath.Join(os.TempDir(), "specql-docker-"+strconv.Itoa(os.Getuid()))
	}
	return &stateDir{root: root, who: who}
}

func (s *stateDir) own() string { return filepath.Join(s.root, s.who.instance) }

func (s *stateDir) prepare() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.made {
		return nil
	}
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := s.private(); err != nil {
		return err
	}
	if err := os.Mkdir(s.own(), 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.own(), "owner"), []byte(s.who.host+"\n"+s.who.process+"\n"), 0o600); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	s.made = true
	return nil
}

// private says whether the root is a directory that only this user and root can change: what
// lies in it is handed to containers, and removed.
func (s *stateDir) private() error {
	info, err := os.Lstat(s.root)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || ok && !trusted(stat.Uid) {
		return fmt.Errorf("state directory %s must be a directory of this user's that only its owner can write", s.root)
	}
	return nil
}

// jobDir is a directory handed to one container.
type jobDir struct {
	path string
	// mounted: it is an in-memory file system of its own, with a bound.
	mounted bool
}

// newDir makes a directory that any user may write in, bounded in size where the system lets
// the runner mount. Others on this host cannot reach it: it lies in a private directory.
func (s *stateDir) newDir(bytes int64) (jobDir, error) {
	if err := s.prepare(); err != nil {
		return jobDir{}, err
	}
	d := jobDir{path: filepath.Join(s.own(), randomName())}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return jobDir{}, fmt.Errorf("make directory for output: %w", err)
	}
	d.mounted = mountTmpfs(d.path, bytes) == nil
	return d, nil
}

func (d jobDir) remove() error {
	if d.path == "" {
		return nil
	}
	if d.mounted {
		if err := unmount(d.path); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(d.path); err != nil {
		return fmt.Errorf("remove directory of output: %w", err)
	}
	return nil
}

// remove takes this runner's own directories away.
func (s *stateDir) remove() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.made {
		return nil
	}
	s.made = false
	return removeInstance(s.own())
}

// heldPrefix begins the names of mount points of volumes. What is mounted there is not the
// runner's: they are never removed with what is in them.
const heldPrefix = "held-"

// hold binds an open file or directory to a new path, which [letGo] takes away.
func (s *stateDir) hold(f *os.File, readOnly bool) (string, error) {
	if err := s.prepare(); err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("look at the volume: %w", err)
	}
	place := filepath.Join(s.own(), heldPrefix+randomName())
	if info.IsDir() {
		err = os.Mkdir(place, 0o700)
	} else {
		err = os.WriteFile(place, nil, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("make a mount point: %w", err)
	}
	if err := bind(f, place, readOnly); err != nil {
		return "", errors.Join(err, letGo(place))
	}
	return place, nil
}

// letGo takes a mount point of a volume away, and nothing of what is mounted there.
func letGo(place string) error {
	if err := unmount(place); err != nil {
		return err
	}
	if err := os.Remove(place); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the mount point of a volume: %w", err)
	}
	return nil
}

func removeInstance(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read state directory: %w", err)
	}
	for _, e := range entries {
		place := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), heldPrefix):
			err = letGo(place)
		case e.IsDir():
			err = jobDir{path: place, mounted: true}.remove()
		default:
			err = os.Remove(place)
		}
		if err != nil {
			return fmt.Errorf("remove state directory: %w", err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove state directory: %w", err)
	}
	return nil
}

// sweep removes the directories of runners that are gone.
func (s *stateDir) sweep() (int, error) {
	entries, err := os.ReadDir(s.root)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read state directory: %w", err)
	}
	if err := s.private(); err != nil {
		return 0, err
	}
	removed := 0
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(s.root, e.Name())
		if !e.IsDir() || e.Name() == s.who.instance || !s.abandoned(dir) {
			continue
		}
		if err := removeInstance(dir); err != nil {
			errs = append(errs, err)
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}

func (s *stateDir) abandoned(dir string) bool {
	text, err := os.ReadFile(filepath.Join(dir, "owner")) //nolint:gosec // below the state directory
	if err != nil {
		// It may be about to be written.
		info, statErr := os.Lstat(dir)
		return statErr == nil && info.IsDir() && time.Since(info.ModTime()) > time.Minute
	}
	host, process, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return s.who.processGone(host, process)
}

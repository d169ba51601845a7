package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Own is the group of the container that this process is in, as it is mounted there, commonly at
// /sys/fs/cgroup: one that has a group, and a view of groups, to itself. The group can be read
// and nothing else: it is the engine's.
func Own(root string) (*Group, error) {
	if controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers")); err == nil {
		return &Group{m: &manager{mode: V2}, dirs: []dir{{path: root, controllers: strings.Fields(string(controllers))}}}, nil
	}
	g := &Group{m: &manager{mode: V1}}
	var seen []string
	for _, controller := range []string{"cpuacct", "memory", "blkio", "pids"} {
		// Controllers that share a hierarchy have links to it.
		path, err := filepath.EvalSymlinks(filepath.Join(root, controller))
		if err != nil {
			continue
		}
		if i := slices.Index(seen, path); i >= 0 {
			g.dirs[i].controllers = append(g.dirs[i].controllers, controller)
			continue
		}
		seen = append(seen, path)
		g.dirs = append(g.dirs, dir{path: path, controllers: []string{controller}})
	}
	if len(g.dirs) == 0 {
		return nil, fmt.Errorf("%w: none are mounted at %s", ErrUnavailable, root)
	}
	return g, nil
}

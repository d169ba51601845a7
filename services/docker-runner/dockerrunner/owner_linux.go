package dockerrunner

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// hostIdentity is the same for all processes that see each other's ids in one boot.
func hostIdentity() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	pids, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return "", fmt.Errorf("read PID namespace: %w", err)
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("read host name: %w", err)
	}
	return name + "/" + strings.TrimSpace(string(boot)) + "/" + pids, nil
}

// processStart is when a process started, in the kernel's ticks since boot.
func processStart(pid int) (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) //nolint:gosec // a number
	if err != nil {
		return "", err
	}
	// The name in parentheses may hold anything, so count from its end. A process that has
	// ended and was not waited for counts as gone.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "", os.ErrNotExist
	}
	return fields[19], nil
}

package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Stat reads what the group has used so far, the groups below it included. It works after
// the last process has ended, until Remove.
func (g *Group) Stat() (Usage, error) {
	if g.m.mode == V1 {
		return g.statV1()
	}
	return g.statV2()
}

// ProcessLimitHits is how often a new process was refused for the limit on processes, in this
// group or the largest figure of one below it. Read it before Kill, which makes refusals of its
// own. Zero where the kernel does not count.
func (g *Group) ProcessLimitHits() int {
	path := g.dirOf("pids")
	if path == "" {
		return 0
	}
	hits := 0
	_ = eachGroup(path, func(path string) error { // v1 counts by the group in which it happened
		if kv, err := readKeys(filepath.Join(path, "pids.events")); err == nil {
			hits = max(hits, count(kv["max"]))
		}
		return nil
	})
	return hits
}

func (g *Group) statV1() (Usage, error) {
	var u Usage
	var errs []error
	if path := g.dirOf("cpuacct"); path != "" {
		ns, err := readNumber(filepath.Join(path, "cpuacct.usage"))
		u.CPUSeconds = scaled(ns, 1e9, err)
		errs = append(errs, err)
	}
	if path := g.dirOf("memory"); path != "" {
		now, err := readNumber(filepath.Join(path, "memory.usage_in_bytes"))
		u.MemoryMB = scaled(now, mebibyte, err)
		errs = append(errs, err)
		peak, err := readNumber(filepath.Join(path, "memory.max_usage_in_bytes"))
		u.PeakMemoryMB = scaled(peak, mebibyte, err)
		// v1 counts a kill in the victim's own group alone.
		errs = append(errs, err, eachGroup(path, func(path string) error {
			kv, err := readKeys(filepath.Join(path, "memory.oom_control"))
			u.OOMKills += count(kv["oom_kill"])
			return err
		}))
	}
	if path := g.dirOf("blkio"); path != "" {
		for _, file := range []string{"blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"} {
			read, written, err := readBlkio(filepath.Join(path, file))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			u.DiskReadMB, u.DiskWriteMB = scaled(read, mebibyte, err), scaled(written, mebibyte, err)
			errs = append(errs, err)
			break
		}
	}
	return u, wrapStat(errs)
}

func (g *Group) statV2() (Usage, error) {
	var u Usage
	path := g.dirs[0].path
	cpu, err := readKeys(filepath.Join(path, "cpu.stat"))
	errs := []error{err}
	if us, ok := cpu["usage_usec"]; ok {
		u.CPUSeconds = scaled(us, 1e6, nil)
	}
	if g.dirs[0].has("memory") {
		now, err := readNumber(filepath.Join(path, "memory.current"))
		u.MemoryMB = scaled(now, mebibyte, err)
		errs = append(errs, err)
		// memory.peak came with Linux 5.19.
		peak, err := readNumber(filepath.Join(path, "memory.peak"))
		u.PeakMemoryMB = scaled(peak, mebibyte, err)
		errs = append(errs, ignoreMissing(err))
		events, err := readKeys(filepath.Join(path, "memory.events"))
		u.OOMKills = count(events["oom_kill"])
		errs = append(errs, err)
	}
	if g.dirs[0].has("io") {
		read, written, err := readIOStat(filepath.Join(path, "io.stat"))
		u.DiskReadMB, u.DiskWriteMB = scaled(read, mebibyte, err), scaled(written, mebibyte, err)
		errs = append(errs, ignoreMissing(err))
	}
	return u, wrapStat(errs)
}

func count(n uint64) int { return int(min(n, 1<<31-1)) }

func wrapStat(errs []error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("read control group: %w", err)
	}
	return nil
}

func scaled(n uint64, unit float64, err error) *float64 {
	if err != nil {
		return nil
	}
	return new(float64(n) / unit)
}

// readFile reads one of the kernel's files. They are small, and reading waits for nothing: without the
// runtime's poller it takes a third of the system calls.
func readFile(path string) ([]byte, error) {
	fd, err := openFile(path, syscall.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = syscall.Close(fd) }()
	data := make([]byte, 0, 512)
	for {
		n, err := ignoringEINTR(func() (int, error) { return syscall.Read(fd, data[len(data):cap(data)]) })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return data, nil
		}
		if data = data[:len(data)+n]; len(data) == cap(data) {
			data = slices.Grow(data, len(data))
		}
	}
}

func openFile(path string, mode int) (int, error) {
	fd, err := ignoringEINTR(func() (int, error) { return syscall.Open(path, mode|syscall.O_CLOEXEC, 0) })
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

func readNumber(path string) (uint64, error) {
	data, err := readFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// readKeys reads lines of a key and a number; other lines are passed over.
func readKeys(path string) (map[string]uint64, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	kv := map[string]uint64{}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		key, value, _ := strings.Cut(s.Text(), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			kv[key] = n
		}
	}
	return kv, nil
}

// readBlkio sums lines such as "8:0 Read 4096".
func readBlkio(path string) (read, written uint64, err error) {
	data, err := readFile(path)
	if err != nil {
		return 0, 0, err
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) != 3 {
			continue
		}
		n, err := strconv.ParseUint(f[2], 10, 64)
		if err != nil {
			continue
		}
		switch f[1] {
		case "Read":
			read += n
		case "Write":
			written += n
		}
	}
	return read, written, nil
}

// readIOStat sums lines such as "8:0 rbytes=4096 wbytes=0 rios=1".
func readIOStat(path string) (read, written uint64, err error) {
	data, err := readFile(path)
	if err != nil {
		return 0, 0, err
	}
	for f := range strings.FieldsSeq(string(data)) {
		key, value, _ := strings.Cut(f, "=")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			continue
		}
		switch key {
		case "rbytes":
			read += n
		case "wbytes":
			written += n
		}
	}
	return read, written, nil
}

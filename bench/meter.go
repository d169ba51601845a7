package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// ticks are what the kernel counts processor time in, for user space: a hundredth of a second on every Linux.
const ticks = 10 * time.Millisecond

// meter measures what a workload costs: processor time of every process that takes part, and
// transactions that write.
type meter struct {
	db *pgxpool.Pool
	// parts are the processes besides this one, with those that they have started, by name.
	parts map[string]int
}

// reading is what a meter shows at a moment.
type reading struct {
	at  time.Time
	cpu map[string]time.Duration
	xid int64
	wal int64
}

// spent is the difference of two readings.
type spent struct {
	took time.Duration
	// cpu by part; client is this process.
	cpu map[string]time.Duration
	// writes are transactions that wrote, wal the bytes of the log of the database.
	writes, wal int64
}

func (s spent) total() (sum time.Duration) {
	for _, d := range s.cpu {
		sum += d
	}
	return sum
}

func (m *meter) read(ctx context.Context) (reading, error) {
	r := reading{at: time.Now(), cpu: map[string]time.Duration{}}
	// Neither the number of the next transaction nor the place in the log is changed by reading it.
	err := m.db.QueryRow(ctx, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").Scan(&r.xid, &r.wal)
	if err != nil {
		return r, fmt.Errorf("read the counters of the database: %w", err)
	}
	for name, pid := range m.parts {
		if r.cpu[name], err = processTime(pid); err != nil {
			return r, fmt.Errorf("read the processor time of %s: %w", name, err)
		}
	}
	r.cpu["client"], err = ownTime()
	return r, err
}

// ownTime is what this process has used.
func ownTime() (time.Duration, error) {
	var own syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &own)
	return time.Duration(own.Utime.Nano() + own.Stime.Nano()), err
}

func (r reading) until(later reading) spent {
	s := spent{took: later.at.Sub(r.at), writes: later.xid - r.xid, wal: later.wal - r.wal, cpu: map[string]time.Duration{}}
	for name, d := range later.cpu {
		s.cpu[name] = d - r.cpu[name]
	}
	return s
}

// processTime is what a process and those that it started have used, the ended ones among them.
func processTime(pid int) (time.Duration, error) {
	own, _, err := stat(pid)
	if err != nil {
		return 0, err
	}
	others, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, path := range others {
		id, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		if d, parent, err := stat(id); err == nil && parent == pid { // it may have ended meanwhile
			own += d
		}
	}
	return own, nil
}

// stat reads the processor time of a process, with that of the children it has waited for, and its parent.
func stat(pid int) (d time.Duration, parent int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name, in brackets, may hold anything.
	fields := strings.Fields(string(text)[strings.LastIndexByte(string(text), ')')+1:])
	if len(fields) < 15 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	if parent, err = strconv.Atoi(fields[1]); err != nil {
		return 0, 0, err
	}
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		d += time.Duration(n) * ticks
	}
	return d, parent, nil
}

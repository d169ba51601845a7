package dockerrunner

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner/cgroup"
)

const mebibyte = 1 << 20

const (
	// usageInterval is how often a running job's figures are passed on.
	usageInterval = time.Second
	// memoryInterval is how often a group's memory is read while its container runs: once
	// it has ended, there is none left to read.
	memoryInterval = 200 * time.Millisecond
)

// meter measures one container: by a control group that is its parent where there is one,
// by the engine's stats elsewhere. The network is always measured by the stats.
type meter struct {
	group *cgroup.Group // nil: none
	// buffered: the kernel counts only what goes straight to a disk, as cgroup v1 does. Most
	// goes through the page cache, and none of it is seen: zero is no measurement there.
	buffered bool

	mu      sync.Mutex
	started time.Time
	ended   time.Time
	stats   *runnerv1.ResourceUsage
	sampled time.Time
	frozen  *runnerv1.ResourceUsage
	// looks are the last readings of the group's memory, oldest first, and finished is when the
	// engine says that the program ended: a later reading is of what was left of it.
	looks    []look
	finished time.Time
	// refused: the kernel refused a process for the limit on processes, as far as it was seen
	// while the container ran.
	refused bool
	// oom is closed once the kernel has ended a process for its memory: what is left of the job
	// has no result to trust.
	oom chan struct{}
}

// told closes m.oom once; m.mu is held.
func (m *meter) told(kills int) {
	if kills == 0 || m.oom == nil {
		return
	}
	select {
	case <-m.oom:
	default:
		close(m.oom)
	}
}

// refusedProcesses says whether a process was refused for the limit on processes.
func (m *meter) refusedProcesses() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.refused
}

// look is one reading of a group's memory, in MiB.
type look struct {
	at     time.Time
	memory *float64
}

// maxLooks is how many readings are kept: the end is told within a few of them.
const maxLooks = 8

// memory is the last reading while the program ran; nil for none. m.mu is held.
func (m *meter) memory() *float64 {
	for _, l := range slices.Backward(m.looks) {
		if m.finished.IsZero() || l.at.Before(m.finished) {
			return l.memory
		}
	}
	return nil
}

// finish tells when the program ended, as the engine writes it; what cannot be read is no time.
func (m *meter) finish(at string) {
	t, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// The program's memory goes a moment before the container counts as finished.
	m.finished = t.Add(-finishMargin)
}

// finishMargin is how long before a container's end its memory may be gone already.
const finishMargin = 20 * time.Millisecond

func (m *meter) start() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.started = time.Now()
}

func (m *meter) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended.IsZero() {
		m.ended = time.Now()
	}
}

// usage gives what was measured until now. groupUsed is false where a group exists in which
// nothing has run.
func (m *meter) usage() (u *runnerv1.ResourceUsage, oomKills int, groupUsed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	u = &runnerv1.ResourceUsage{Source: "docker"}
	if m.stats != nil && m.representative() {
		u.CpuSeconds, u.MemoryMb, u.PeakMemoryMb = m.stats.CpuSeconds, m.stats.MemoryMb, m.stats.PeakMemoryMb
		u.DiskReadMb, u.DiskWriteMb = m.stats.DiskReadMb, m.stats.DiskWriteMb
		u.NetworkRxMb, u.NetworkTxMb = m.stats.NetworkRxMb, m.stats.NetworkTxMb
	}
	if m.group != nil {
		began := time.Now()
		if g, err := m.group.Stat(); err == nil && g.CPUSeconds != nil && *g.CPUSeconds > 0 {
			groupUsed, oomKills = true, g.OOMKills
			u.Source = "cgroup"
			m.told(oomKills)
			m.refused = m.refused || m.group.ProcessLimitHits() > 0
			if m.ended.IsZero() {
				m.looks = append(m.looks, look{at: began, memory: g.MemoryMB})
				if len(m.looks) > maxLooks {
					m.looks = slices.Delete(m.looks, 0, 1)
				}
			}
			u.CpuSeconds, u.MemoryMb, u.PeakMemoryMb = g.CPUSeconds, m.memory(), g.PeakMemoryMB
			u.DiskReadMb, u.DiskWriteMb = larger(u.DiskReadMb, g.DiskReadMB), larger(u.DiskWriteMb, g.DiskWriteMB)
		}
	}
	if m.buffered {
		u.DiskReadMb, u.DiskWriteMb = positive(u.DiskReadMb), positive(u.DiskWriteMb)
	}
	if m.started.IsZero() {
		return u, oomKills, groupUsed
	}
	end := m.ended
	if end.IsZero() {
		end = time.Now()
	}
	if wall := end.Sub(m.started).Seconds(); u.CpuSeconds != nil && wall > 0 {
		u.CpuUsagePercent = new(*u.CpuSeconds / wall * 100)
	}
	return u, oomKills, groupUsed
}

// larger is the larger figure of two, or the one that was measured.
func larger(a, b *float64) *float64 {
	if a == nil || b != nil && *b > *a {
		return b
	}
	return a
}

// positive is nil for zero.
func positive(v *float64) *float64 {
	if v == nil || *v <= 0 {
		return nil
	}
	return v
}

// representative says whether the last sample of the stats says something of the whole run:
// one that saw less than half of it, as with a container that ends within a second of its
// start, would pass for a measurement and be none.
func (m *meter) representative() bool {
	return m.ended.IsZero() || m.sampled.Sub(m.started) >= m.ended.Sub(m.started)/2
}

// watch follows the engine's stats of a container until ctx ends or the container does.
func (m *meter) watch(ctx context.Context, c *client.Client, id string) {
	response, err := c.ContainerStats(ctx, id, client.ContainerStatsOptions{Stream: true})
	if err != nil {
		return // what is not measured is absent
	}
	defer func() { _ = response.Body.Close() }()
	decoder := json.NewDecoder(response.Body)
	for {
		var s container.StatsResponse
		if decoder.Decode(&s) != nil {
			return
		}
		m.take(&s)
	}
}

func (m *meter) take(s *container.StatsResponse) {
	// A container that has ended gives a sample of zeros.
	if s.CPUStats.CPUUsage.TotalUsage == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	peak := max(s.MemoryStats.MaxUsage, s.MemoryStats.Usage)
	last := m.stats
	if last == nil {
		last = &runnerv1.ResourceUsage{}
	}
	u := &runnerv1.ResourceUsage{CpuSeconds: new(float64(s.CPUStats.CPUUsage.TotalUsage) / 1e9)}
	if s.MemoryStats.Usage > 0 {
		u.MemoryMb = new(float64(s.MemoryStats.Usage) / mebibyte)
		u.PeakMemoryMb = new(max(float64(peak)/mebibyte, last.GetPeakMemoryMb()))
	}
	if entries := s.BlkioStats.IoServiceBytesRecursive; entries != nil {
		var read, written uint64
		for _, e := range entries {
			switch strings.ToLower(e.Op) {
			case "read":
				read += e.Value
			case "write":
				written += e.Value
			}
		}
		u.DiskReadMb, u.DiskWriteMb = new(float64(read)/mebibyte), new(float64(written)/mebibyte)
	}
	if len(s.Networks) > 0 {
		var rx, tx uint64
		for _, n := range s.Networks {
			rx += n.RxBytes
			tx += n.TxBytes
		}
		u.NetworkRxMb, u.NetworkTxMb = new(float64(rx)/mebibyte), new(float64(tx)/mebibyte)
	}
	m.stats, m.sampled = u, time.Now()
}

// freeze takes the last figures, before the group is removed. It is false where a container
// ran and the group saw nothing of it.
func (m *meter) freeze() bool {
	u, _, used := m.usage()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frozen, m.group = u, nil
	return used || m.ended.IsZero()
}

// final gives the figures of the whole run.
func (m *meter) final() *runnerv1.ResourceUsage {
	m.mu.Lock()
	frozen := m.frozen
	m.mu.Unlock()
	if frozen != nil {
		return frozen
	}
	u, _, _ := m.usage()
	return u
}

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

func parts(r *result) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(r.CPU)) {
		out = append(out, fmt.Sprintf("%s %.3f", name, r.CPU[name]/float64(r.Steps)))
	}
	return strings.Join(out, ", ")
}

// spread is a figure that was taken several times.
type spread struct{ median, least, most float64 }

func spreadOf[T any](of []T, get func(T) float64) spread {
	var all []float64
	for _, x := range of {
		all = append(all, get(x))
	}
	slices.Sort(all)
	middle := all[len(all)/2]
	if len(all)%2 == 0 {
		middle = (middle + all[len(all)/2-1]) / 2
	}
	return spread{middle, all[0], all[len(all)-1]}
}

// text writes a figure with so many digits, and its spread where there is one.
func (s spread) text(digits int) string {
	if s.least == s.most {
		return fmt.Sprintf("%.*f", digits, s.median)
	}
	return fmt.Sprintf("%.*f (%.*f–%.*f)", digits, s.median, digits, s.least, digits, s.most)
}

// group puts together what was measured alike, in the order of the first.
func group[T any, K comparable](all []T, key func(T) K) (keys []K, groups map[K][]T) {
	groups = map[K][]T{}
	for _, x := range all {
		k := key(x)
		if groups[k] == nil {
			keys = append(keys, k)
		}
		groups[k] = append(groups[k], x)
	}
	return keys, groups
}

// workload is what results have in common.
type workload struct {
	system, shape string
	concurrency   int
}

func (b *bench) report(ctx context.Context, dir string) error {
	raw, err := json.MarshalIndent(map[string]any{"floors": b.floors, "workloads": b.results}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), raw, 0o600); err != nil {
		return err
	}
	page, plots := b.page(ctx)
	for name, svg := range plots {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(svg), 0o600); err != nil {
			return err
		}
	}
	b.sayf("%s", filepath.Join(dir, "report.md"))
	return os.WriteFile(filepath.Join(dir, "report.md"), []byte(page), 0o600)
}

func (b *bench) page(ctx context.Context) (page string, plots map[string]string) {
	var w strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&w, format+"\n", args...) }
	p("# Measured %s\n", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	for _, line := range b.machine(ctx) {
		p("- %s", line)
	}
	p("\nMedian (least–most) of the rounds. F1 and F32 are pgbench's insert and update of a row in one commit, at 1 and 32 clients, taken right before each workload; so is the echo, a bare gRPC call.\n")
	p("| floor | at once | a second | p50, ms |\n| --- | --- | --- | --- |")
	type at struct {
		name        string
		concurrency int
	}
	keys, floors := group(b.floors, func(f floor) at { return at{f.Name, f.Concurrency} })
	for _, k := range keys {
		p("| %s | %d | %s | %s |", k.name, k.concurrency, spreadOf(floors[k], func(f floor) float64 { return f.PerSecond }).text(0), spreadOf(floors[k], func(f floor) float64 { return f.P50Ms }).text(3))
	}
	p("\n| workload | at once | system | p50, ms | p50 in floors | workflows a second | / F32 | write transactions a workflow | CPU-ms a workflow | CPU-ms a step |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	loads, results := group(b.results, func(r *result) workload { return workload{r.System, r.Shape, r.Concurrency} })
	var cpu, rate []bar
	for _, k := range loads {
		all := results[k]
		s := func(digits int, get func(*result) float64) string { return spreadOf(all, get).text(digits) }
		floors := "" // one at a time: how many times the commits and calls that it consists of
		if k.concurrency == 1 && k.system == ours {
			floors = s(2, func(r *result) float64 { return r.P50Ms / (r.Writes*1000/r.F1 + float64(r.Steps+1)*r.EchoMs) })
		}
		p("| %s | %d | %s | %s | %s | %s | %s | %s | %s | %s |", k.shape, k.concurrency, k.system, s(2, func(r *result) float64 { return r.P50Ms }), floors,
			s(1, func(r *result) float64 { return r.PerSecond }), s(4, (*result).rate), s(3, func(r *result) float64 { return r.Writes }),
			s(2, func(r *result) float64 { return r.CPUMs }), s(3, (*result).stepCPU))
		label := fmt.Sprintf("%s × %d, %s", k.shape, k.concurrency, k.system)
		cpu = append(cpu, bar{label, spreadOf(all, (*result).stepCPU)})
		rate = append(rate, bar{label, spreadOf(all, func(r *result) float64 { return r.rate() * float64(r.Steps) })})
	}
	p("\n'p50 in floors' is the time of one workflow alone over that of its write transactions at F1's rate and of its calls as bare echoes.\n")
	b.aims(p, results)
	b.compare(p, loads, results)
	p("![CPU a step](cpu.svg)\n\n![steps a second](rate.svg)")
	return w.String(), map[string]string{
		"cpu.svg":  plot("CPU-ms a step: orchestrator, runner, client and PostgreSQL together", cpu),
		"rate.svg": plot("Steps a second, in transactions a second that PostgreSQL commits (F32)", rate),
	}
}

// compare writes how many times a peer's figures ours are, round by round.
func (b *bench) compare(p func(format string, args ...any), loads []workload, results map[workload][]*result) {
	head := true
	for _, k := range loads {
		own := results[workload{ours, k.shape, k.concurrency}]
		all := results[k]
		if k.system == ours || len(own) != len(all) {
			continue
		}
		if head {
			p("Ours over theirs, round by round: workflows a second in floors (more is better), time of one and CPU (less is better).\n")
			p("| workload | at once | over | workflows a second / F32 | p50 | CPU |\n| --- | --- | --- | --- | --- | --- |")
			head = false
		}
		ratio := func(digits int, get func(*result) float64) string {
			rounds := make([]float64, len(all))
			for i := range all {
				rounds[i] = get(own[i]) / get(all[i])
			}
			return spreadOf(rounds, func(x float64) float64 { return x }).text(digits)
		}
		p("| %s | %d | %s | %s | %s | %s |", k.shape, k.concurrency, k.system, ratio(2, (*result).rate), ratio(3, func(r *result) float64 { return r.P50Ms }), ratio(3, func(r *result) float64 { return r.CPUMs }))
	}
	if !head {
		p("")
	}
}

// machine says where and with what it was measured.
func (b *bench) machine(ctx context.Context) []string {
	first := func(name string, args ...string) string {
		out, err := exec.CommandContext(ctx, name, args...).Output() //nolint:gosec // fixed names
		if err != nil {
			return "unknown"
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return line
	}
	var version string
	if err := b.db.QueryRow(ctx, "SELECT version()").Scan(&version); err != nil {
		version = "unknown"
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		load = []byte("unknown")
	}
	return []string{
		fmt.Sprintf("%d processors (%s), kernel %s; load average at the end %s", runtime.NumCPU(), runtime.GOARCH, first("uname", "-r"), strings.TrimSpace(string(load))),
		version + "; fsync, synchronous_commit and full_page_writes on, " + strings.Join(settings, ", "),
		runtime.Version() + ", commit " + cmp.Or(first("git", "rev-parse", "--short", "HEAD"), "unknown"),
		"Orchestrator, runner and client are processes with mutual TLS between them. A workflow is sent as YAML and waited for with its start.",
	}
}

// bar is one bar of a plot.
type bar struct {
	label string
	value spread
}

func plot(title string, bars []bar) string {
	const left, width, height, gap = 250, 420, 18, 8
	most := 0.0
	for _, b := range bars {
		most = max(most, b.value.most)
	}
	var w strings.Builder
	fmt.Fprintf(&w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", left+width+110, 34+len(bars)*(height+gap))
	fmt.Fprintf(&w, `<rect width="100%%" height="100%%" fill="white"/><text x="8" y="18" font-size="13" font-weight="bold">%s</text>`+"\n", html.EscapeString(title))
	for i, b := range bars {
		y := 30 + i*(height+gap)
		x := func(v float64) float64 { return left + v/max(most, 1e-9)*width }
		fmt.Fprintf(&w, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%.1f" height="%d" fill="#4878a8"/>`, left-6, y+13, html.EscapeString(b.label), left, y, x(b.value.median)-left, height)
		fmt.Fprintf(&w, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#222"/><text x="%.1f" y="%d">%.3g</text>`+"\n", x(b.value.least), x(b.value.most), y+height/2, y+height/2, x(b.value.most)+6, y+13, b.value.median)
	}
	w.WriteString("</svg>\n")
	return w.String()
}

package server

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
)

// defaultReloadEvery is how often the files are looked at.
const defaultReloadEvery = 5 * time.Second

// reloader puts the registry's files in force when they change. Their content is compared, and not
// their times: mounted volumes change by links.
type reloader struct {
	o        Options
	registry *registry.Registry
	reloads  *prometheus.CounterVec
	// failed is what Reload failed with last, so that it is told once.
	failed string
}

func newReloads(r prometheus.Registerer) *prometheus.CounterVec {
	return telemetry.Registered(r, prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "specql_registry_reloads_total", Help: "Changes of the registry's files, by outcome: applied, invalid or unreadable.",
	}, []string{"outcome"}))
}

func (r *reloader) follow(ctx context.Context) {
	tick := time.NewTicker(cmp.Or(r.o.ReloadEvery, defaultReloadEvery))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		read := Options{Env: r.o.Env}
		err := r.o.Reload(&read)
		switch {
		case err != nil:
			// Files may be written at this moment.
			if err.Error() != r.failed {
				r.o.Logger.Error("the registry's files cannot be read; what was in force stays", "error", err)
				r.reloads.WithLabelValues("unreadable").Inc()
			}
			r.failed = err.Error()
		case !same(read.Registry, r.o.Registry) || !same(read.Alerts, r.o.Alerts) || !slices.EqualFunc(read.Entities, r.o.Entities, sameFile):
			r.apply(ctx, &read)
			r.failed = ""
		default:
			r.failed = ""
		}
	}
}

func same(a, b *spec.File) bool { return a == b || a != nil && b != nil && sameFile(*a, *b) }

func sameFile(a, b spec.File) bool { return a.Name == b.Name && bytes.Equal(a.Content, b.Content) }

// apply puts changed files in force. Those with errors are not tried again until they change.
func (r *reloader) apply(ctx context.Context, read *Options) {
	s, problems, err := r.registry.ApplyFiles(ctx, documents(read))
	if err != nil {
		if ctx.Err() == nil {
			r.o.Logger.Error("the changed registry is not in force yet; it is tried again", "error", err)
		}
		return
	}
	r.o.Registry, r.o.Entities, r.o.Alerts = read.Registry, read.Entities, read.Alerts
	for _, p := range problems {
		if p.Warning {
			r.o.Logger.Warn("the registry has a warning", "problem", p.String())
		} else {
			r.o.Logger.Error("the changed registry has an error", "problem", p.String())
		}
	}
	if s == nil {
		r.o.Logger.Error("the changed registry is not put in force; what was stays", "registry", read.Registry.Name)
		r.reloads.WithLabelValues("invalid").Inc()
		return
	}
	r.o.Logger.Info("the changed registry is in force", "digest", s.Digest, "services", len(s.Registry.Services), "entities", len(s.Entities))
	r.reloads.WithLabelValues("applied").Inc()
}

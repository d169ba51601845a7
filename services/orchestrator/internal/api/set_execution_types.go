package api

import (
	"context"
	"slices"
	"strings"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const maxTypes = 100

// SetExecutionTypes implements RegistryService.
func (r *Registry) SetExecutionTypes(ctx context.Context, req *specqlv1.SetExecutionTypesRequest) (*specqlv1.SetExecutionTypesResponse, error) {
	changes := len(req.GetDisable())+len(req.GetEnable()) > 0
	if changes {
		caller := auth.From(ctx)
		if err := caller.May(auth.Admin); err != nil {
			return nil, err
		}
		if err := caller.MayAll(); err != nil {
			return nil, err
		}
	}
	known, err := r.executionTypes(ctx)
	if err != nil {
		return nil, err
	}
	var v intake.Violations
	for field, names := range map[string][]string{"disable": req.GetDisable(), "enable": req.GetEnable()} {
		if len(names) > maxTypes {
			v.Add(field, "has %d names; at most %d are taken", len(names), maxTypes)
			continue
		}
		for _, name := range names {
			switch _, there := known[name]; {
			case name == "" || len(name) > maxName:
				v.Add(field, "a name has between 1 and %d bytes", maxName)
			case !there && field == "disable":
				v.Add(field, "there is no execution type %.255q; those there are: %s", name, strings.Join(sorted(known), ", "))
			}
		}
	}
	for _, name := range req.GetDisable() {
		if slices.Contains(req.GetEnable(), name) {
			v.Add("disable", "%.255q is to be enabled as well", name)
		}
	}
	if err := v.Err(); err != nil {
		return nil, err
	}
	if changes {
		if err := r.Types.SetExecutionTypes(ctx, req.GetDisable(), req.GetEnable()); err != nil {
			return nil, err
		}
		if err := r.Refresh(ctx); err != nil {
			return nil, err
		}
		if known, err = r.executionTypes(ctx); err != nil {
			return nil, err
		}
	}
	resp := &specqlv1.SetExecutionTypesResponse{}
	for _, name := range sorted(known) {
		resp.Types = append(resp.Types, &specqlv1.ExecutionTypeState{Name: name, Enabled: known[name].Enabled, ChangedAt: timeProto(known[name].ChangedAt)})
	}
	return resp, nil
}

// executionTypes are the built-in types, those that have a runner and those that were ever
// set.
func (r *Registry) executionTypes(ctx context.Context) (map[string]store.ExecutionType, error) {
	set, err := r.Types.ExecutionTypes(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range append([]string{"http", "shell", "docker", "serverless"}, r.Runners.ExecutionTypes()...) {
		if _, there := set[name]; !there {
			set[name] = store.ExecutionType{Enabled: true}
		}
	}
	return set, nil
}

func sorted(set map[string]store.ExecutionType) []string {
	names := make([]string, 0, len(set))
	for name := range set {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
)

// Runners check the parts of a service that belong to them.
type Runners interface {
	// ExecutionTypes that have a runner, sorted.
	ExecutionTypes() []string
	// Validate checks a service.
	Validate(ctx context.Context, req *runnerv1.ValidateRequest) ([]*runnerv1.Problem, error)
}

// Snapshot is what can be run.
type Snapshot struct {
	Digest   string
	Env      string
	Registry *spec.Registry
	// Entities by name, sorted.
	Entities []*spec.Entity
	// AppliedAt is when it was put in force.
	AppliedAt time.Time

	docs    Documents
	content []byte
	plans   map[string]*plan.Plan
}

// Entity finds an entity by name, whatever its case.
func (s *Snapshot) Entity(name string) *spec.Entity {
	for _, e := range s.Entities {
		if strings.EqualFold(e.Name, name) {
			return e
		}
	}
	return nil
}

// Plan of an entity's action; nil for none.
func (s *Snapshot) Plan(entity, action string) *plan.Plan {
	return s.plans[strings.ToLower(entity)+"\x00"+action]
}

// BuildOptions say how documents are read.
type BuildOptions struct {
	LookupEnv func(string) (string, bool)
	Strict    bool
	// PublicOnly says that LookupEnv knows the public variables alone, for the problems' mends.
	PublicOnly bool
	// Runners check the services; nil leaves them unchecked.
	Runners Runners
}

// Build makes a snapshot. It comes back only where no problem is an error.
func Build(ctx context.Context, d Documents, o BuildOptions) (*Snapshot, spec.Problems, error) {
	vars := newLookup(d.Vars, o.LookupEnv)
	so := spec.Options{Env: d.Env, LookupEnv: vars.get, Strict: o.Strict}
	reg, problems := spec.ParseRegistry(d.Registry.file(), so)
	problems = append(problems, addAlerts(reg, d.Alerts, so)...)
	s := &Snapshot{Registry: reg, Env: d.Env, plans: map[string]*plan.Plan{}}
	first := map[string]*spec.Entity{}
	for _, doc := range d.Entities {
		e, ps := spec.ParseEntity(doc.file(), so)
		problems = append(problems, ps...)
		if e == nil {
			continue
		}
		if other := first[strings.ToLower(e.Name)]; other != nil {
			problems = append(problems, spec.Problem{
				Position: e.Position, Path: "entity", Message: fmt.Sprintf("the entity %s is in %s already", e.Name, other.Position),
				Mend: "rename or join them",
			})
			continue
		}
		first[strings.ToLower(e.Name)] = e
		s.Entities = append(s.Entities, e)
	}
	sort.Slice(s.Entities, func(i, j int) bool { return s.Entities[i].Name < s.Entities[j].Name })
	problems = append(problems, checkReferences(s.Entities)...)
	if reg != nil {
		found := checkServices(ctx, reg, o.Runners)
		// The runners know which execution types there are; spec could only guess.
		problems = slices.DeleteFunc(problems, func(p spec.Problem) bool {
			return p.Warning && slices.ContainsFunc(found, func(q spec.Problem) bool {
				return !q.Warning && q.Path == p.Path && q.Line == p.Line && strings.HasSuffix(p.Path, ".execution_type")
			})
		})
		problems = append(problems, found...)
		problems = append(problems, checkAlerts(reg)...)
		for _, e := range s.Entities {
			for _, a := range e.Actions {
				p, ps := plan.Compile(a, e, reg)
				if p != nil {
					ps = append(ps, p.OpenNames()...)
				}
				for _, problem := range ps {
					problem.Path = "actions." + a.Name + "." + problem.Path
					problems = append(problems, problem)
				}
				if p == nil {
					continue
				}
				s.plans[strings.ToLower(e.Name)+"\x00"+a.Name] = p
			}
		}
	}
	for i := range problems {
		if o.Strict {
			problems[i].Warning = false
		}
		if o.PublicOnly && strings.HasPrefix(problems[i].Message, "the environment variable ") {
			problems[i].Mend = "a registry that is sent to the API may name variables that begin with " + VariablePrefix + " alone, and they have to be set where the orchestrator runs"
		}
	}
	problems.Sort()
	if reg == nil || problems.HasErrors() {
		return nil, problems, nil
	}
	// What the runners' environment adds is not part of the documents; what the registry read is.
	d.Vars = vars.vars()
	s.docs = d
	var err error
	if s.content, s.Digest, err = encode(d); err != nil {
		return nil, problems, err
	}
	return s, problems, nil
}

// checkServices asks the runners.
func checkServices(ctx context.Context, reg *spec.Registry, runners Runners) spec.Problems {
	if runners == nil {
		return nil
	}
	types := runners.ExecutionTypes()
	known := map[string]bool{}
	for _, t := range types {
		known[t] = true
	}
	silent := map[string]bool{}
	var out spec.Problems
	for _, svc := range slices.Concat(reg.Services, reg.Duplicates) {
		if !known[svc.ExecutionType] {
			mend := "execution types there are: " + strings.Join(types, ", ") + fmt.Sprintf("; a runner of your own is added with --runner %s=ADDRESS", svc.ExecutionType)
			if guess := spec.DidYouMean(svc.ExecutionType, types); guess != "" {
				mend = "did you mean " + guess + "? " + mend
			}
			out = append(out, spec.Problem{
				Position: svc.PositionOf("execution_type"), Path: svc.Path + ".execution_type",
				Message: fmt.Sprintf("no runner serves the execution type %q", svc.ExecutionType), Mend: mend,
			})
			continue
		}
		if silent[svc.ExecutionType] {
			continue
		}
		req, err := validateRequest(svc)
		if err != nil {
			out = append(out, spec.Problem{Position: svc.Position, Path: svc.Path, Message: err.Error()})
			continue
		}
		cctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		problems, err := runners.Validate(cctx, req)
		cancel()
		if err != nil {
			silent[svc.ExecutionType] = true
			out = append(out, spec.Problem{
				Position: svc.Position, Path: svc.Path, Warning: true,
				Message: fmt.Sprintf("the %s runner did not answer, so that its services are not checked: %s", svc.ExecutionType, fault.From(err).Message),
				Mend:    "start the runner, or mend its address",
			})
			continue
		}
		for _, p := range problems {
			out = append(out, spec.Problem{
				Position: svc.PositionOf(p.GetPath()), Path: svc.Path + "." + byIndex(svc, p.GetPath()),
				Message: p.GetMessage(), Mend: p.GetMend(), Warning: p.GetWarning(),
			})
		}
	}
	return out
}

// addAlerts reads a file of alerts into a registry.
func addAlerts(reg *spec.Registry, doc Document, o spec.Options) spec.Problems {
	if doc.Name == "" && doc.Content == "" {
		return nil
	}
	o.Env = "" // it has no overlays
	file, problems := spec.ParseRegistry(doc.file(), o)
	if file == nil || reg == nil {
		return problems
	}
	if len(file.Services) > 0 || len(file.Envs) > 0 {
		problems = append(problems, spec.Problem{Position: spec.Position{File: doc.Name}, Path: "services", Message: "a file of alerts holds alerts alone", Mend: "move the services into the registry"})
	}
	for _, a := range file.Alerts {
		if i := slices.IndexFunc(reg.Alerts, func(b *spec.Alert) bool { return a.Name == b.Name }); i >= 0 {
			problems = append(problems, spec.Problem{
				Position: a.Position, Path: "alerts." + a.Name, Message: fmt.Sprintf("the alert %q is there already, in %s", a.Name, reg.Alerts[i].Position), Mend: "rename one of the two",
			})
			continue
		}
		reg.Alerts = append(reg.Alerts, a)
	}
	return problems
}

// checkAlerts finds alerts that tell a service or an operation that is not there.
func checkAlerts(reg *spec.Registry) spec.Problems {
	var out spec.Problems
	for _, a := range reg.Alerts {
		if a.Notify == nil || a.Notify.Service == "" {
			continue
		}
		p := spec.Problem{Position: a.Notify.Position, Path: fmt.Sprintf("alerts.%s.notify", a.Name)}
		svc := reg.Service(a.Notify.Service)
		switch {
		case svc == nil:
			p.Message = fmt.Sprintf("there is no service %q", a.Notify.Service)
			p.Mend = oneOf(a.Notify.Service, reg.ServiceNames())
		case a.Notify.Operation != "" && svc.Operation(a.Notify.Operation) == nil:
			p.Message = fmt.Sprintf("the service %s has no operation %q", svc.Name, a.Notify.Operation)
			p.Mend = oneOf(a.Notify.Operation, svc.OperationNames())
		default:
			continue
		}
		out = append(out, p)
	}
	return out
}

func oneOf(name string, names []string) string {
	if guess := spec.DidYouMean(name, names); guess != "" {
		return fmt.Sprintf("did you mean %q?", guess)
	}
	if len(names) == 0 {
		return "there are none"
	}
	return "there are " + strings.Join(names[:min(len(names), 20)], ", ")
}

// byIndex turns the runner's operations.NAME into the document's operations[i].
func byIndex(svc *spec.Service, path string) string {
	for i, op := range svc.Operations {
		rest, ok := strings.CutPrefix(path, "operations."+op.Name)
		if ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			return fmt.Sprintf("operations[%d]%s", i, rest)
		}
	}
	return path
}

// checkReferences says which fields refer to an entity or a field that these documents lack.
// A warning alone: the table may be made elsewhere.
func checkReferences(entities []*spec.Entity) spec.Problems {
	var out spec.Problems
	byName := map[string]*spec.Entity{}
	for _, e := range entities {
		byName[strings.ToLower(e.Name)] = e
	}
	for _, e := range entities {
		for _, f := range e.Fields {
			if f.References == "" {
				continue
			}
			name, field, _ := strings.Cut(f.References, ".")
			target := byName[strings.ToLower(name)]
			switch {
			case target == nil:
				out = append(out, spec.Problem{
					Position: f.Position, Path: "fields." + f.Name + ".references", Warning: true,
					Message: fmt.Sprintf("%s refers to %s, and there is no such entity here", f.Name, name), Mend: "add its file, or mend the name",
				})
			case field != "" && target.Field(field) == nil:
				out = append(out, spec.Problem{
					Position: f.Position, Path: "fields." + f.Name + ".references", Warning: true,
					Message: fmt.Sprintf("%s has no field %s", target.Name, field), Mend: "fields there are: " + strings.Join(target.FieldNames(), ", "),
				})
			}
		}
	}
	return out
}

// Service is a service and its operations as its runner sees them.
func Service(svc *spec.Service) (*runnerv1.ValidateRequest, error) { return validateRequest(svc) }

func validateRequest(svc *spec.Service) (*runnerv1.ValidateRequest, error) {
	object := func(m map[string]any) ([]byte, error) {
		if len(m) == 0 {
			return []byte("{}"), nil
		}
		return json.Marshal(m)
	}
	config, err := object(svc.RunnerConfig)
	if err != nil {
		return nil, fmt.Errorf("runner_config cannot be said in JSON: %w", err)
	}
	policy, err := object(svc.SecurityPolicy)
	if err != nil {
		return nil, fmt.Errorf("security_policy cannot be said in JSON: %w", err)
	}
	req := &runnerv1.ValidateRequest{Service: &runnerv1.Service{
		Name: svc.Name, ExecutionType: svc.ExecutionType, RunnerConfig: config, SecurityPolicy: policy,
	}}
	for _, op := range svc.Operations {
		c, err := object(op.Config)
		if err != nil {
			return nil, fmt.Errorf("operation %s cannot be said in JSON: %w", op.Name, err)
		}
		req.Operations = append(req.Operations, &runnerv1.Operation{Name: op.Name, Config: c})
	}
	return req, nil
}

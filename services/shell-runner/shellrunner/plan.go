package shellrunner

import (
	"strings"
	"sync"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// maxTexts is how many services' texts are kept decoded, maxText how long one may be for that.
	maxTexts = 256
	maxText  = 64 << 10
)

// decoded is what the texts of a service and an operation say. It is shared and never changed.
type decoded struct {
	config    Config
	operation Operation
	policy    Policy
	// effective is the policy with the ceiling, digest its name.
	effective effective
	digest    string
}

// texts are services decoded before. What they lead to on the machine is looked at for each job.
type texts struct {
	mu    sync.Mutex
	known map[string]*decoded
}

// decode reads a job's service and operation. On an error, the result has the policy, as far as it
// could be read.
func (r *Runner) decode(job *runner.Job) (*decoded, error) {
	// No text of JSON has a NUL in it, and others are not kept.
	key := strings.Join([]string{string(job.Service.Policy), string(job.Service.Config), string(job.Operation.Config)}, "\x00")
	r.texts.mu.Lock()
	d, ok := r.texts.known[key]
	r.texts.mu.Unlock()
	if ok {
		return d, nil
	}
	policy, err := runner.Decode[Policy](job.Service.Policy)
	d = &decoded{policy: policy, effective: narrow(policy, r.ceiling)}
	d.digest = runner.Digest(d.effective)
	if err != nil {
		return d, at("security_policy", err)
	}
	if problem := policy.ResourceLimits.check(); problem != "" {
		return d, fault.New(fault.Validation, "security_policy.%s", problem)
	}
	if d.config, err = runner.Decode[Config](job.Service.Config); err != nil {
		return d, at("runner_config", err)
	}
	if d.operation, err = runner.Decode[Operation](job.Operation.Config); err != nil {
		return d, at("operations."+clip(job.Operation.Name), err)
	}
	if len(key) > maxText {
		return d, nil
	}
	r.texts.mu.Lock()
	defer r.texts.mu.Unlock()
	if r.texts.known == nil {
		r.texts.known = map[string]*decoded{}
	}
	if len(r.texts.known) >= maxTexts {
		for other := range r.texts.known {
			delete(r.texts.known, other)
			break
		}
	}
	r.texts.known[key] = d
	return d, nil
}

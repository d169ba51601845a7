package local

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/specql/mesh/cmd/specql/internal/sandbox"
	"github.com/specql/mesh/pkg/spec"
)

// Prepare sets the variables of the examples' registry in this process: the folder of the
// scripts, the addresses of stand-ins for the cloud services, and placeholders for the
// secrets of those services that the registry then reaches at a stand-in. What is set
// already is left alone. It returns the stand-ins in use; nil where the documents are not
// the examples'.
func Prepare(d Documents) (*sandbox.Sandbox, []*sandbox.Endpoint, error) {
	if d.Examples == "" {
		return nil, nil, nil
	}
	if err := setUnset(examplesDir, d.Examples); err != nil {
		return nil, nil, err
	}
	s, err := sandbox.Start()
	if err != nil {
		return nil, nil, err
	}
	var used []*sandbox.Endpoint
	for _, e := range s.Endpoints {
		if os.Getenv(e.Variable) == "" {
			used = append(used, e)
		}
		if err := setUnset(e.Variable, e.URL); err != nil {
			return s, nil, err
		}
	}
	registry, _ := spec.ParseRegistry(d.Registry, spec.Options{Env: d.Env, LookupEnv: os.LookupEnv})
	if registry == nil {
		return s, used, nil // what is wrong with it is said when it is served
	}
	for _, service := range registry.Services {
		if reaches(service.RunnerConfig, used) {
			if err := placeholders(service.RunnerConfig, s.ServiceAccount); err != nil {
				return s, used, err
			}
		}
	}
	return s, used, nil
}

// reaches says whether a service is configured with the address of a stand-in.
func reaches(config map[string]any, endpoints []*sandbox.Endpoint) bool {
	raw, err := json.Marshal(config)
	return err == nil && slices.ContainsFunc(endpoints, func(e *sandbox.Endpoint) bool { return strings.Contains(string(raw), e.URL) })
}

// placeholders sets every variable that a configuration names and that is not set.
func placeholders(config map[string]any, serviceAccount string) error {
	if config["provider"] == "aws" {
		for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} {
			if err := setUnset(name, "specql-sandbox-placeholder"); err != nil {
				return err
			}
		}
	}
	for key, value := range config {
		var err error
		switch v := value.(type) {
		case map[string]any:
			err = placeholders(v, serviceAccount)
		case string:
			switch {
			case key == "session_token_env_var" || !strings.HasSuffix(key, "_env_var"):
			case key == "service_account_key_env_var":
				err = setUnset(v, serviceAccount)
			default:
				err = setUnset(v, "specql-sandbox-placeholder")
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func setUnset(name, value string) error {
	if os.Getenv(name) != "" {
		return nil
	}
	if err := os.Setenv(name, value); err != nil {
		return fmt.Errorf("setting %s: %w", name, err)
	}
	return nil
}

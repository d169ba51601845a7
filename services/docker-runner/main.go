// Command docker-runner carries out calls in containers: of a Docker engine, or as Jobs of a
// Kubernetes cluster.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/kubernetes"
)

// Values of --backend.
const (
	backendDocker     = "docker"
	backendKubernetes = "kubernetes"
)

func main() {
	os.Exit(runner.Main("docker-runner", build, runner.Flags(flags)))
}

func flags(fs *pflag.FlagSet) {
	fs.String("backend", backendDocker, "what runs containers: docker, an engine; kubernetes, Jobs of a cluster")
	fs.StringSlice("require-isolation", nil, "ways of holding a job without which the runner does not start, as 'specql runners' names them; all for every one")
	fs.String("docker-host", "", "address of the Docker engine, such as unix:///var/run/docker.sock; empty: DOCKER_HOST, else the default socket")
	fs.String("state-dir", "", "directory for the output of running jobs on an engine; empty: /run/specql-docker, or one of the user's own")
	fs.String("kubeconfig", "", "file that says where the cluster's API is; empty: as the pod's service account")
	fs.String("kube-namespace", "", "namespace of the Jobs, which holds nothing else")
	fs.String("kube-shim-image", "", "image that holds the shim, commonly this program's own")
	fs.String("kube-service-account", "", "service account of the Jobs' pods, which get no token; empty: default")
	fs.StringSlice("kube-pull-secret", nil, "names of Secrets there with the credentials of registries")
	fs.String("kube-pod", "", "where the Jobs' pods run, as JSON with nodeSelector, tolerations and runtimeClassName")
}

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	text := func(name string) string { return env.Flags.Lookup(name).Value.String() }
	required, err := env.Flags.GetStringSlice("require-isolation")
	if err != nil {
		return nil, fmt.Errorf("--require-isolation: %w", err)
	}
	var ceiling *dockerrunner.Policy
	if env.PolicyJSON != nil {
		policy, err := runner.Decode[dockerrunner.Policy](env.PolicyJSON)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		ceiling = &policy
	}
	isolation := []runner.Feature{runner.HideProcess()}
	switch backend := text("backend"); backend {
	case backendDocker:
		return dockerrunner.New(dockerrunner.Options{
			Host: text("docker-host"), StateDir: text("state-dir"), Logger: env.Logger, DeniedPaths: own(env.Flags),
			Isolation: isolation, RequireIsolation: required, Ceiling: ceiling,
		})
	case backendKubernetes:
		return onKubernetes(env, text, kubernetes.Options{
			Namespace: text("kube-namespace"), ShimImage: text("kube-shim-image"), ServiceAccount: text("kube-service-account"),
			Logger: env.Logger, Isolation: isolation, RequireIsolation: required, Ceiling: ceiling,
		})
	default:
		return nil, fmt.Errorf("--backend: %q is neither docker nor kubernetes", backend)
	}
}

func onKubernetes(env *runner.Env, text func(string) string, o kubernetes.Options) (runner.JobRunner, error) {
	var err error
	if o.PullSecrets, err = env.Flags.GetStringSlice("kube-pull-secret"); err != nil {
		return nil, fmt.Errorf("--kube-pull-secret: %w", err)
	}
	if pod := text("kube-pod"); pod != "" {
		if err := json.Unmarshal([]byte(pod), &o.Pod); err != nil {
			return nil, fmt.Errorf("--kube-pod: it is not the JSON of nodeSelector, tolerations and runtimeClassName: %w", err)
		}
	}
	if file := text("kubeconfig"); file != "" {
		o.Config, err = clientcmd.BuildConfigFromFlags("", file)
	} else if o.Config, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("--kubeconfig: this is no pod of a cluster; name the file that says where its API is")
	}
	if err != nil {
		return nil, fmt.Errorf("the cluster's API: %w", err)
	}
	return kubernetes.New(o)
}

// own are the files of this program: its keys, its policy and itself. No container gets them.
func own(fs *pflag.FlagSet) []string {
	var files []string
	for _, flag := range []string{"tls-cert", "tls-key", "tls-ca", "policy"} {
		if f := fs.Lookup(flag); f != nil {
			files = append(files, f.Value.String())
		}
	}
	if self, err := os.Executable(); err == nil {
		files = append(files, self)
	}
	return files
}

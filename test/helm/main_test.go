// Package helm tests the chart: what is rendered with each of its values files, against the schemas of Kubernetes, and
// what no rendering may hold. `make helm-test` builds the tools and runs it.
package helm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"
)

const chart = "../../deploy/helm/specql"

// tool is a program of tools/helm, in the folder that HELM_TOOLS names.
func tool(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("HELM_TOOLS")
	if dir == "" {
		dir = "../../.bin"
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	require.NoError(t, err)
	require.FileExists(t, path, "run make helm-test, which builds it")
	return path
}

func run(t *testing.T, stdin []byte, name string, args ...string) ([]byte, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+t.TempDir(), "HELM_CONFIG_HOME="+t.TempDir(), "HELM_DATA_HOME="+t.TempDir())
	return cmd.CombinedOutput()
}

func valuesFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(chart, "ci", "*-values.yaml"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, len(files), 6)
	return files
}

func render(t *testing.T, values string, more ...string) []byte {
	t.Helper()
	out, err := run(t, nil, tool(t, "helm"), append([]string{"template", "mesh", chart, "--namespace", "specql", "--values", values}, more...)...)
	require.NoError(t, err, "%s", out)
	return out
}

type object = map[string]any

func documents(t *testing.T, rendered []byte) []object {
	t.Helper()
	var all []object
	for d := yaml.NewDecoder(bytes.NewReader(rendered)); ; {
		var doc object
		if d.Decode(&doc) != nil {
			break
		}
		if len(doc) > 0 {
			all = append(all, doc)
		}
	}
	require.NotEmpty(t, all)
	return all
}

func TestLint(t *testing.T) {
	t.Parallel()
	for _, file := range valuesFiles(t) {
		out, err := run(t, nil, tool(t, "helm"), "lint", "--strict", chart, "--values", file)
		require.NoError(t, err, "%s: %s", file, out)
	}
}

// TestKubernetesTakesIt: every object of every rendering is one that Kubernetes knows, field by field.
func TestKubernetesTakesIt(t *testing.T) {
	t.Parallel()
	schemas := os.Getenv("KUBERNETES_SCHEMAS")
	require.NotEmpty(t, schemas, "run make helm-test, which makes them")
	for _, file := range valuesFiles(t) {
		rendered := render(t, file)
		out, err := run(t, rendered, tool(t, "kubeconform"), "-strict", "-summary", "-skip", "ServiceMonitor,PrometheusRule,Certificate",
			"-schema-location", filepath.Join(schemas, "{{.ResourceKind}}{{.KindSuffix}}.json"))
		require.NoError(t, err, "%s: %s", file, out)
		require.Contains(t, string(out), "Invalid: 0, Errors: 0")
	}
	// A field that nobody knows is found.
	rendered := bytes.Replace(render(t, valuesFiles(t)[0]), []byte("enableServiceLinks:"), []byte("enableServiceLink:"), 1)
	out, err := run(t, rendered, tool(t, "kubeconform"), "-strict", "-schema-location", filepath.Join(schemas, "{{.ResourceKind}}{{.KindSuffix}}.json"))
	require.Error(t, err, "%s", out)
}

// TestRights: no rendering has a right on everything, a right on the cluster, or a way to the engine of a node.
func TestRights(t *testing.T) {
	t.Parallel()
	for _, file := range valuesFiles(t) {
		rendered := render(t, file)
		for _, never := range []string{"docker.sock", "containerd.sock", "hostPath:", "hostNetwork", "hostPID", "hostIPC", "privileged"} {
			require.NotContains(t, string(rendered), never, file)
		}
		for _, doc := range documents(t, rendered) {
			kind, _ := doc["kind"].(string)
			require.NotContains(t, kind, "ClusterRole", file)
			if kind != "Role" {
				continue
			}
			require.NotEqual(t, "specql", doc["metadata"].(object)["namespace"], "%s: the mesh's own namespace has nothing that a pod may ask for", file)
			for _, r := range doc["rules"].([]any) {
				rule := r.(object)
				for _, key := range []string{"apiGroups", "resources", "verbs"} {
					require.NotEmpty(t, rule[key], file)
					for _, v := range rule[key].([]any) {
						require.NotContains(t, v.(string), "*", "%s: %v", file, rule)
						require.NotContains(t, []string{"pods/exec", "pods/attach", "escalate", "bind", "impersonate"}, v.(string), file)
					}
				}
				if rule["resources"].([]any)[0] == "secrets" {
					require.Equal(t, []any{"create"}, rule["verbs"], "nobody reads Secrets")
				}
			}
		}
	}
}

// TestRestricted: pods are what the restricted Pod Security allows, but for the one exception that is asked for.
func TestRestricted(t *testing.T) {
	t.Parallel()
	for _, file := range valuesFiles(t) {
		pods := 0
		for _, doc := range documents(t, render(t, file)) {
			spec, _ := doc["spec"].(object)
			labels := doc["metadata"].(object)["labels"].(object)
			template, ok := spec["template"].(object)
			if ok {
				spec = template["spec"].(object)
			} else if doc["kind"] != "Pod" {
				continue
			}
			pods++
			pod := spec["securityContext"].(object)
			require.Equal(t, true, pod["runAsNonRoot"], file)
			profile := pod["seccompProfile"].(object)["type"]
			if strings.Contains(file, "name-spaces") && labels["app.kubernetes.io/component"] == "shell-runner" {
				require.Equal(t, "Unconfined", profile)
			} else {
				require.Equal(t, "RuntimeDefault", profile, "%s: %v", file, labels)
			}
			require.Equal(t, labels["app.kubernetes.io/component"] == "docker-runner", spec["automountServiceAccountToken"], "%s: %v", file, labels)
			for _, c := range spec["containers"].([]any) {
				require.Equal(t, object{"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": object{"drop": []any{"ALL"}}}, c.(object)["securityContext"], file)
				require.NotEmpty(t, c.(object)["resources"], file)
			}
		}
		require.GreaterOrEqual(t, pods, 3)
	}
}

func TestUnits(t *testing.T) {
	t.Parallel()
	out, err := run(t, nil, tool(t, "helm-unittest"), "--strict", "--file", "tests/*_test.yaml", chart)
	require.NoError(t, err, "%s", out)
}

func TestTheSchemaIsThatOfTheValues(t *testing.T) {
	t.Parallel()
	made, err := run(t, nil, "go", "run", "./schema", filepath.Join(chart, "values.yaml"))
	require.NoError(t, err, "%s", made)
	kept, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	require.NoError(t, err)
	require.Equal(t, string(kept), string(made), "run make helm-schema and commit")
}

// TestFiguresAreKnown: alerts and dashboard ask for figures that there are.
func TestFiguresAreKnown(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/observability.md")
	require.NoError(t, err)
	figure := regexp.MustCompile(`specql_[a-z_]+`)
	for _, file := range []string{"alerts.yaml", "dashboard.json"} {
		text, err := os.ReadFile(filepath.Join(chart, "files", file))
		require.NoError(t, err)
		found := figure.FindAllString(string(text), -1)
		require.NotEmpty(t, found)
		for _, name := range found {
			require.Contains(t, string(page), "`"+strings.TrimSuffix(name, "_bucket")+"`", file)
		}
	}
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// commandNames are the commands that --help tells of.
func commandNames(t *testing.T, args ...string) []string {
	t.Helper()
	r := specql(t, t.TempDir(), append(args, "--help")...)
	require.Equal(t, 0, r.status, r.err)
	_, list, _ := strings.Cut(r.out, "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	var names []string
	for line := range strings.Lines(list) {
		names = append(names, strings.Fields(line)[0])
	}
	return names
}

// tried is a command as it is tried; each time with arguments of its own, where it changes something.
type tried struct {
	args   func() []string
	status int // of the work; 0 unless the work is to fail
}

// TestEveryCommand runs each command on each store: -o json prints one JSON document and nothing else on standard output, text
// prints something; the exit status is 0 for work that is done, 1 for work that failed, and 2 for a wrong use.
func TestEveryCommand(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	registry := filepath.Join(dir, "registry", "service_registry.yaml")
	write("entities/order.yaml", "entity: order\nfields: {total: integer}\nactions:\n  count:\n    actions:\n      - call_service: {service: web, operation: count, input: {name: n, size: 3}}\n")
	asks := write("asks.yaml", "actions: [{await_signal: {name: go}}]\n")
	fails := write("fails.yaml", "actions: [{call_service: {service: denied, operation: list}}]\n")
	says := write("says.yaml", "actions: [{call_service: {service: script, operation: echo, input: {text: hello}}}]\n")
	bad := write("bad.yaml", "services: [{name: a, type: t, category: c, oprations: []}]\n")
	old := write("old.yaml", "services:\n  - {name: a, type: t, category: c, operations: [{name: o}]}\n")

	onBothStores(t, dir, func(t *testing.T, address string) {
		database := migrated(t, dir)
		client := []string{"--address", address}
		as := func(args ...string) func() []string { return func() []string { return args } }
		at := func(args ...string) func() []string { return as(slices.Concat(args, client)...) }
		on := func(args ...string) func() []string { return as(append(args, "--database", database)...) }
		started := func(file string) string {
			t.Helper()
			r := specql(t, dir, "execute-job", "--file", file, "--detach", "-o", "json", "--address", address)
			require.Equal(t, 0, r.status, r.err)
			return decode[run](t, r.out).ID
		}
		// with makes a run for the command that follows.
		with := func(file string, end bool, args ...string) func() []string {
			return func() []string {
				id := started(file)
				if end {
					require.Eventually(t, func() bool {
						status := decode[run](t, specql(t, dir, "runs", "show", id, "-o", "json", "--address", address).out).Status
						return status == "failed" || status == "completed"
					}, time.Minute, 20*time.Millisecond)
				}
				list := slices.Concat(args, client)
				for i := range list {
					list[i] = strings.ReplaceAll(list[i], "ID", id)
				}
				return list
			}
		}
		commands := map[string][]tried{
			"alerts":            {{args: at("alerts")}},
			"benchmark":         {{args: at("benchmark", "--services", "web.count", "script", "--requests", "3")}, {at("benchmark", "--services", "denied.list", "--requests", "1"), 1}},
			"certs":             {{args: func() []string { return []string{"certs", filepath.Join(t.TempDir(), "certs")} }}},
			"check-permissions": {{args: on("check-permissions")}},
			"doctor":            {{args: at("doctor", "--database", database)}, {as("doctor", "--address", "127.0.0.1:1"), 1}},
			"execute-job":       {{args: at("execute-job", "--entity", "order", "--action", "count")}, {at("execute-job", "--file", fails), 1}},
			"execution-types":   {{args: at("execution-types")}, {args: at("execution-types", "--enable", "http", "shell")}},
			"generate-schema":   {{args: as("generate-schema", "entities")}},
			"load-test":         {{args: at("load-test", "--service", "web", "--operation", "count", "--requests", "3")}, {at("load-test", "--service", "denied", "--operation", "list", "--requests", "1"), 1}},
			"migrate-schema":    {{args: on("migrate-schema")}},
			"migration-check":   {{args: as("migration-check", old)}},
			"profile":           {{args: at("profile", "--service", "web", "--operation", "count", "--requests", "2")}},
			"resource-check":    {{args: at("resource-check", "--service", "script")}},
			"rollback":          {{args: at("rollback", "--to", "http-only")}},
			"runners":           {{args: at("runners")}},
			"runs list":         {{args: at("runs", "list", "--limit", "3")}},
			"runs show":         {{args: with(fails, true, "runs", "show", "ID")}, {at("runs", "show", "00000000-0000-7000-8000-000000000000"), 2}},
			"runs logs":         {{args: with(says, true, "runs", "logs", "ID")}},
			"runs cancel":       {{args: with(asks, false, "runs", "cancel", "ID")}, {with(fails, true, "runs", "cancel", "ID"), 2}},
			"runs retry":        {{with(fails, true, "runs", "retry", "ID"), 1}},
			"runs signal":       {{args: with(asks, false, "runs", "signal", "ID", "go", "--payload", "{}")}},
			"security-audit":    {{args: at("security-audit", "--service", "denied")}},
			"token":             {{args: as("token", "--subject", "ann", "--role", "viewer")}},
			"validate-config":   {{args: as("validate-config", registry, "--entities", "entities")}, {as("validate-config", bad), 2}},
			"validate-schema":   {{args: on("validate-schema")}},
		}
		names := slices.DeleteFunc(commandNames(t), func(name string) bool {
			return slices.Contains([]string{"completion", "demo", "dev", "help", "runs"}, name)
		})
		for _, name := range commandNames(t, "runs") {
			names = append(names, "runs "+name)
		}
		require.Len(t, commands, len(names), "what --help tells of is tried: %v", names)
		slices.Sort(names)
		if i := slices.Index(names, "rollback"); i >= 0 {
			names = append(slices.Delete(names, i, i+1), "rollback") // nothing but http is called after it
		}
		for _, name := range names {
			t.Run(name, func(t *testing.T) {
				require.NotEmpty(t, commands[name], "%s is not tried", name)
				for _, c := range commands[name] {
					args := append(c.args(), "-o", "json")
					r := specql(t, dir, args...)
					require.Equal(t, c.status, r.status, "%v\n%s%s", args, r.out, r.err)
					if c.status == 0 || r.out != "" {
						require.True(t, json.Valid([]byte(r.out)), "%v prints more or less than one JSON document:\n%s", args, r.out)
						require.Regexp(t, `^[{\[]`, r.out)
					} else {
						require.Contains(t, r.err, "specql: ", "%v says nothing", args)
					}
					require.NotContains(t, r.out+r.err, "\x1b")

					r = specql(t, dir, c.args()...)
					require.Equal(t, c.status, r.status, "%s\n%s", r.out, r.err)
					require.NotEmpty(t, r.out+r.err)
					require.False(t, json.Valid([]byte(r.out)) && regexp.MustCompile(`^\s*[{\[]`).MatchString(r.out) && name != "execute-job" && name != "runs show", "text is JSON: %s", r.out)
				}
				first := strings.Fields(name)
				for _, wrong := range [][]string{{"--no-such-flag"}, {"-o", "yaml"}, {"one", "two", "three"}} {
					r := specql(t, dir, append(slices.Clone(first), wrong...)...)
					require.Equal(t, 2, r.status, "%v %v: %s", first, wrong, r.err)
					require.Empty(t, r.out)
					require.NotEmpty(t, r.err)
				}
				// Where nobody answers, the work fails.
				for _, flag := range []string{"--address", "--database"} {
					args := commands[name][0].args()
					i := slices.Index(args, flag)
					if i < 0 || name == "doctor" {
						continue
					}
					args[i+1] = map[string]string{"--address": "127.0.0.1:1", "--database": "postgres://nobody@127.0.0.1:1/none?connect_timeout=5"}[flag]
					r := specql(t, dir, append(args, "-o", "json")...)
					require.Equal(t, 1, r.status, "%v: %s", args, r.err)
					require.Empty(t, r.out)
					require.NotEmpty(t, r.err)
				}
			})
		}
	})
}

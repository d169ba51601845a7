package server_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/services/orchestrator/server"
)

// identities are tokens by subject, in a file.
func identities(t *testing.T, entries map[string]string) (path string, tokens map[string]string) {
	t.Helper()
	tokens = map[string]string{}
	var text strings.Builder
	for subject, rest := range entries {
		token, err := mesh.NewToken()
		require.NoError(t, err)
		tokens[subject] = token
		fmt.Fprintf(&text, "- {subject: %s, %s, hash: %q}\n", subject, rest, mesh.HashToken(token))
	}
	path = filepath.Join(t.TempDir(), "tokens.yaml")
	require.NoError(t, os.WriteFile(path, []byte(text.String()), 0o600))
	return path, tokens
}

func TestRolesAndTenants(t *testing.T) {
	t.Parallel()
	path, tokens := identities(t, map[string]string{
		"ann": "role: operator, tenant: acme", "gus": "role: operator, tenant: globex", "vic": "role: viewer, tenant: acme",
		"bea": "role: operator, tenants: [acme, globex]", "boss": "role: admin",
	})
	s := start(t, t.TempDir(), func(o *server.Options) { o.Auth = &server.Auth{Tokens: path} })
	as := func(subject string, tenant ...string) context.Context {
		md := metadata.Pairs("authorization", "Bearer "+tokens[subject])
		for _, name := range tenant {
			md.Append("specql-tenant", name)
		}
		return metadata.NewOutgoingContext(t.Context(), md)
	}
	insight := specqlv1.NewInsightServiceClient(s.conn)
	req := &specqlv1.ExecuteActionRequest{Workflow: workflow("say"), IdempotencyKey: "same", Wait: durationpb.New(time.Minute)}
	execute := func(ctx context.Context) *specqlv1.Run {
		resp, err := s.o.ExecuteAction(ctx, req)
		require.NoError(t, err)
		return resp.GetRun()
	}

	// Whoever says nothing, or something wrong, gets nothing but the health.
	for _, md := range []metadata.MD{
		nil, metadata.Pairs("authorization", "Bearer wrong"), metadata.Pairs("authorization", tokens["boss"]), metadata.Pairs("authorization", "Basic "+tokens["boss"]),
		metadata.Pairs("authorization", "Bearer "+tokens["boss"], "authorization", "Bearer "+tokens["boss"]), metadata.Pairs("specql-tenant", "acme"),
	} {
		ctx := metadata.NewOutgoingContext(t.Context(), md)
		_, err := s.o.ListRuns(ctx, &specqlv1.ListRunsRequest{})
		require.Equal(t, codes.Unauthenticated, status.Code(err), "%v", md)
		watching, err := s.o.WatchRun(ctx, &specqlv1.WatchRunRequest{Id: "x"})
		require.NoError(t, err)
		_, err = watching.Recv()
		require.Equal(t, codes.Unauthenticated, status.Code(err))
		reflect, err := grpc_reflection_v1.NewServerReflectionClient(s.conn).ServerReflectionInfo(ctx)
		require.NoError(t, err)
		_, err = reflect.Recv()
		require.Equal(t, codes.Unauthenticated, status.Code(err))
		_, err = grpc_health_v1.NewHealthClient(s.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		require.NoError(t, err)
	}

	// Idempotency keys are of a tenant, in the memory of the orchestrator, too.
	acme, globex := execute(as("ann")), execute(as("gus"))
	require.NotEqual(t, acme.GetId(), globex.GetId())
	require.Equal(t, acme.GetId(), execute(as("ann")).GetId())
	require.Equal(t, globex.GetId(), execute(as("bea", "globex")).GetId())
	require.Equal(t, "ann acme", acme.GetJobs()[0].GetSecurityContext().GetSubject()+" "+acme.GetJobs()[0].GetSecurityContext().GetTenantId())
	_, err := s.o.ExecuteAction(as("bea"), req)
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = s.o.ExecuteAction(as("ann", "globex"), req)
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = s.o.ExecuteAction(as("ann", "acme", "globex"), req)
	require.Equal(t, codes.InvalidArgument, status.Code(err))

	list := func(ctx context.Context) (ids []string) {
		resp, err := s.o.ListRuns(ctx, &specqlv1.ListRunsRequest{})
		require.NoError(t, err)
		for _, r := range resp.GetRuns() {
			ids = append(ids, r.GetId())
		}
		return ids
	}
	require.Equal(t, []string{acme.GetId()}, list(as("vic")))
	require.ElementsMatch(t, []string{acme.GetId(), globex.GetId()}, list(as("bea")))
	require.ElementsMatch(t, []string{acme.GetId(), globex.GetId()}, list(as("boss")))
	require.Equal(t, []string{globex.GetId()}, list(as("boss", "globex")))
	require.Empty(t, list(as("boss", "other")))

	// What is another tenant's is not there.
	for name, call := range map[string]func(context.Context, string) error{
		"get": func(ctx context.Context, id string) error {
			_, err := s.o.GetRun(ctx, &specqlv1.GetRunRequest{Id: id})
			return err
		},
		"watch": func(ctx context.Context, id string) error {
			stream, err := s.o.WatchRun(ctx, &specqlv1.WatchRunRequest{Id: id, Logs: true})
			require.NoError(t, err)
			_, err = stream.Recv()
			return err
		},
		"cancel": func(ctx context.Context, id string) error {
			_, err := s.o.CancelRun(ctx, &specqlv1.CancelRunRequest{Id: id})
			return err
		},
		"retry": func(ctx context.Context, id string) error {
			_, err := s.o.RetryRun(ctx, &specqlv1.RetryRunRequest{Id: id})
			return err
		},
		"signal": func(ctx context.Context, id string) error {
			_, err := s.o.SignalRun(ctx, &specqlv1.SignalRunRequest{Id: id, Name: "n"})
			return err
		},
	} {
		err := call(as("gus"), acme.GetId())
		require.Equal(t, codes.NotFound, status.Code(err), "%s: %v", name, err)
		require.Equal(t, codes.NotFound, status.Code(call(as("boss", "globex"), acme.GetId())), name)
		require.NotEqual(t, codes.NotFound, status.Code(call(as("boss"), acme.GetId())), name)
		if name != "get" && name != "watch" {
			err = call(as("vic"), acme.GetId())
			require.Equal(t, codes.PermissionDenied, status.Code(err), name)
			require.ErrorContains(t, err, "needs the role operator")
		}
	}
	for subject, want := range map[string]int64{"gus": 1, "vic": 1, "bea": 2, "boss": 2} {
		resp, err := insight.GetPerformance(as(subject), &specqlv1.GetPerformanceRequest{})
		require.NoError(t, err)
		require.Equal(t, want, resp.GetPerformance()[0].GetJobs(), subject)
	}
	_, err = insight.ListAlerts(as("vic"), &specqlv1.ListAlertsRequest{})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = s.r.GetRegistry(as("vic"), &specqlv1.GetRegistryRequest{})
	require.NoError(t, err)
	_, err = s.r.ApplyRegistry(as("ann"), &specqlv1.ApplyRegistryRequest{})
	require.ErrorContains(t, err, "needs the role admin")
	_, err = s.r.SetExecutionTypes(as("bea"), &specqlv1.SetExecutionTypesRequest{Disable: []string{"echo"}})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	for _, subject := range []string{"vic", "ann"} {
		types, err := s.r.SetExecutionTypes(as(subject), &specqlv1.SetExecutionTypesRequest{})
		require.NoError(t, err, "to see them is no change")
		require.NotEmpty(t, types.GetTypes())
		for _, change := range []*specqlv1.SetExecutionTypesRequest{{Disable: []string{"echo"}}, {Enable: []string{"echo"}}} {
			_, err = s.r.SetExecutionTypes(as(subject), change)
			require.Equal(t, codes.PermissionDenied, status.Code(err))
			require.ErrorContains(t, err, "needs the role admin")
		}
	}
}

// What is of all tenants is changed by who is of all of them.
func TestAnAdminOfATenantChangesNothingOfAll(t *testing.T) {
	t.Parallel()
	path, tokens := identities(t, map[string]string{"boss": "role: admin", "ada": "role: admin, tenant: acme", "all": `role: admin, tenant: "*"`})
	s := start(t, t.TempDir(), func(o *server.Options) { o.Auth = &server.Auth{Tokens: path} })
	as := func(subject string, more ...string) context.Context {
		return metadata.NewOutgoingContext(t.Context(), metadata.Pairs(append([]string{"authorization", "Bearer " + tokens[subject]}, more...)...))
	}
	current, err := s.r.GetRegistry(as("ada"), &specqlv1.GetRegistryRequest{})
	require.NoError(t, err)
	apply := func(ctx context.Context) error {
		_, err := s.r.ApplyRegistry(ctx, &specqlv1.ApplyRegistryRequest{Registry: &specqlv1.Document{Name: "mine.yaml", Content: []byte("services: []\n")}})
		return err
	}
	set := func(ctx context.Context, types ...string) error {
		_, err := s.r.SetExecutionTypes(ctx, &specqlv1.SetExecutionTypesRequest{Disable: types})
		return err
	}
	for _, ctx := range []context.Context{as("ada"), as("ada", "specql-tenant", "acme")} {
		require.Equal(t, codes.PermissionDenied, status.Code(apply(ctx)))
		require.Equal(t, codes.PermissionDenied, status.Code(set(ctx, "echo")))
		require.NoError(t, set(ctx), "to see them is no change")
	}
	after, err := s.r.GetRegistry(as("boss"), &specqlv1.GetRegistryRequest{})
	require.NoError(t, err)
	require.Equal(t, current.GetDigest(), after.GetDigest())
	// To choose a tenant makes nobody less.
	for _, ctx := range []context.Context{as("boss"), as("all"), as("boss", "specql-tenant", "acme")} {
		require.NoError(t, set(ctx, "echo"))
		require.NoError(t, apply(ctx))
	}
}

// A stream shows nothing more of a tenant that its token is not of any more.
func TestAWatchEndsWithTheTenantsOfItsToken(t *testing.T) {
	t.Parallel()
	path, tokens := identities(t, map[string]string{"bea": "role: operator, tenants: [acme, globex]"})
	s := start(t, t.TempDir(), func(o *server.Options) { o.Auth = &server.Auth{Tokens: path} })
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+tokens["bea"])), time.Minute)
	defer cancel()
	resp, err := s.o.ExecuteAction(metadata.AppendToOutgoingContext(ctx, "specql-tenant", "globex"), &specqlv1.ExecuteActionRequest{
		Workflow: "actions:\n  - await_signal: {name: go, timeout: 3600}\n",
	})
	require.NoError(t, err)
	stream, err := s.o.WatchRun(ctx, &specqlv1.WatchRunRequest{Id: resp.GetRun().GetId()})
	require.NoError(t, err)
	_, err = stream.Recv()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, []byte(fmt.Sprintf("- {subject: bea, role: operator, tenant: acme, hash: %q}\n", mesh.HashToken(tokens["bea"]))), 0o600))
	for err == nil {
		_, err = stream.Recv()
	}
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err) // clients ask again, and learn
	stream, err = s.o.WatchRun(ctx, &specqlv1.WatchRunRequest{Id: resp.GetRun().GetId()})
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, codes.NotFound, status.Code(err))
}

func TestTheConsoleAsksWhoIsThere(t *testing.T) {
	t.Parallel()
	path, tokens := identities(t, map[string]string{"ann": "role: operator, tenant: acme", "gus": "role: operator, tenant: globex", "boss": "role: admin"})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := start(t, t.TempDir(), func(o *server.Options) { o.Auth, o.Console = &server.Auth{Tokens: path}, lis })
	base := "http://" + lis.Addr().String()
	const hostile = `<script>alert(1)</script>`
	resp, err := s.o.ExecuteAction(metadata.NewOutgoingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+tokens["ann"])), &specqlv1.ExecuteActionRequest{
		Workflow: strings.Replace(workflow("say"), "actions:", "input: {x: \"string?\"}\nactions:", 1), Input: object(t, `{"x": "`+hostile+`"}`), Wait: durationpb.New(time.Minute),
	})
	require.NoError(t, err)
	id := resp.GetRun().GetId()

	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	browser := &http.Client{Jar: jar}
	defer browser.CloseIdleConnections()
	do := func(method, path, body string, header ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(body))
		require.NoError(t, err)
		if body != "" {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := browser.Do(req)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp, string(text)
	}
	form := func(token string) string { return url.Values{"token": {token}}.Encode() }
	for _, page := range []string{"/", "/runs/" + id, "/alerts"} {
		answer, text := do("GET", page, "")
		require.Equal(t, "/login", answer.Request.URL.Path)
		require.NotContains(t, text, id)
	}
	answer, _ := do("POST", "/login", form("wrong"))
	require.Equal(t, http.StatusUnauthorized, answer.StatusCode)
	answer, _ = do("POST", "/login", form(tokens["ann"]), "Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate")
	require.Equal(t, http.StatusForbidden, answer.StatusCode, "a page of others logs nobody in")
	answer, text := do("POST", "/login", form(tokens["ann"]))
	require.Equal(t, http.StatusOK, answer.StatusCode)
	require.Contains(t, text, id)
	for _, c := range jar.Cookies(answer.Request.URL) {
		require.NotContains(t, c.Value, tokens["ann"], "cookies go to every port of a host")
	}
	_, text = do("GET", "/runs/"+id, "")
	require.NotContains(t, text, hostile)
	require.Contains(t, text, `\u003cscript\u003e`)
	for header, want := range map[string]string{"Content-Security-Policy": "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"} {
		require.Contains(t, answer.Header.Get(header), want)
	}
	answer, _ = do("GET", "/", "", "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors")
	require.Equal(t, http.StatusForbidden, answer.StatusCode)
	answer, _ = do("GET", "/alerts", "")
	require.Equal(t, http.StatusForbidden, answer.StatusCode)
	answer, _ = do("GET", "/?tenant=globex", "")
	require.Equal(t, http.StatusForbidden, answer.StatusCode)
	_, text = do("POST", "/logout", "")
	require.NotContains(t, text, id)

	answer, _ = do("GET", "/runs/"+id, "", "Authorization", "Bearer "+tokens["gus"])
	require.Equal(t, http.StatusNotFound, answer.StatusCode)
	_, text = do("GET", "/?tenant=acme", "", "Authorization", "Bearer "+tokens["boss"])
	require.Contains(t, text, id)
	_, text = do("GET", "/?tenant=other", "", "Authorization", "Bearer "+tokens["boss"])
	require.NotContains(t, text, id)
	answer, _ = do("GET", "/", "", "Authorization", "Bearer wrong")
	require.Equal(t, http.StatusUnauthorized, answer.StatusCode)
}

// Whoever is refused leaves a line of the log and a count: who, what, from where, and the rule.
func TestWhoIsRefusedIsWrittenDown(t *testing.T) {
	t.Parallel()
	path, tokens := identities(t, map[string]string{"vic": "role: viewer, tenant: acme", "ann": "role: operator, tenant: acme"})
	log := &lockedBuffer{}
	web, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	metrics := ""
	s := start(t, t.TempDir(), func(o *server.Options) {
		o.Auth, o.Console, o.Logger, metrics = &server.Auth{Tokens: path}, web, slog.New(slog.NewTextHandler(log, nil)), o.Metrics.Addr().String()
	})
	as := func(token string, more ...string) context.Context {
		return metadata.NewOutgoingContext(t.Context(), metadata.Pairs(append([]string{"authorization", "Bearer " + token}, more...)...))
	}
	const guess = "guess-of-a-token"
	_, err = s.o.CancelRun(as(tokens["vic"]), &specqlv1.CancelRunRequest{Id: "x"})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = s.o.ListRuns(as(tokens["ann"], "specql-tenant", "globex"), &specqlv1.ListRunsRequest{})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = specqlv1.NewInsightServiceClient(s.conn).ListAlerts(as(tokens["ann"]), &specqlv1.ListAlertsRequest{})
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	_, err = s.o.GetRun(as(guess), &specqlv1.GetRunRequest{Id: "x"})
	require.Equal(t, codes.Unauthenticated, status.Code(err))
	resp, err := http.PostForm("http://"+web.Addr().String()+"/login", url.Values{"token": {guess}})
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())

	const orchestrator = "/specql.v1.OrchestratorService/"
	for _, want := range [][]string{
		{"rule=role", "method=" + orchestrator + "CancelRun", "remote=127.0.0.1:", "code=PermissionDenied", "subject=vic", "role=viewer", "need=operator"},
		{"rule=tenant", "method=" + orchestrator + "ListRuns", "subject=ann", "role=operator", "tenant=globex"},
		{"rule=tenant", "method=/specql.v1.InsightService/ListAlerts", "subject=ann", "tenant=*"},
		{"rule=token", "method=" + orchestrator + "GetRun", "remote=127.0.0.1:", "code=Unauthenticated"},
		{"rule=token", "method=console", "remote=127.0.0.1:"},
	} {
		require.True(t, hasLine(log.String(), append(want, "level=WARN", `msg="a caller was refused"`)), "%v\n%s", want, log)
	}
	require.NotContains(t, log.String(), guess)
	_, text := get(t, "http://"+metrics+"/metrics")
	count := func(method, rule string) string {
		return fmt.Sprintf("specql_callers_refused_total{method=%q,rule=%q} ", method, rule)
	}
	require.Contains(t, text, count(orchestrator+"CancelRun", "role")+"1\n")
	require.Contains(t, text, count(orchestrator+"ListRuns", "tenant")+"1\n")
	require.Contains(t, text, count(orchestrator+"GetRun", "token")+"1\n")
	require.Contains(t, text, count("console", "token")+"1\n")
}

// hasLine tells whether one line of a text has all parts.
func hasLine(text string, parts []string) bool {
	for line := range strings.Lines(text) {
		missing := slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) })
		if !missing {
			return true
		}
	}
	return false
}

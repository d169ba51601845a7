package command

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// FuzzReadPolicy reads the file of security-audit --policy.
func FuzzReadPolicy(f *testing.F) {
	for _, text := range []string{
		"allowed_domains: [a.example]", "security_policy: {resource_limits: {memory_mb: 64}}", "security_policy:", "services: [{name: S, security_policy: {a: 1}}]",
		"services: [{name: s, operations: [], security_policy: }]", "prod: {services: [{name: s, security_policy: {a: {b: 2}}}]}\ndev: {services: []}",
		"a: &a [*a]", "a: 2026-01-01", "a: .nan", "a: !!binary AA==", "1: {2: 3}", "a: ${HOME:-x}", "<<: {a: 1}", "? [a]\n: b", "a: 1\n---\nb: 2", "a: &x [1,1]\nb: &y [*x,*x,*x]\nc: [*y,*y,*y]",
	} {
		f.Add([]byte(text), "")
		f.Add([]byte(text), "prod")
	}
	under, err := structpb.NewStruct(map[string]any{"a": map[string]any{"c": 1.0}})
	require.NoError(f, err)
	info := &specqlv1.ServiceInfo{Name: "s", SecurityPolicy: under}
	path := filepath.Join(f.TempDir(), "policy.yaml")
	f.Fuzz(func(t *testing.T, text []byte, env string) {
		require.NoError(t, os.WriteFile(path, text, 0o600))
		policy, err := readPolicy(path, env, info)
		if err != nil {
			return
		}
		require.NotNil(t, policy)
		if sent, err := structpb.NewStruct(policy); err == nil {
			_, err = proto.Marshal(sent)
			require.NoError(t, err)
			require.Less(t, proto.Size(sent), 64<<20, "few bytes became many")
		}
		require.True(t, proto.Equal(under, info.GetSecurityPolicy()), "the policy in force has changed")
	})
}

// FuzzSince reads how far back a report looks.
func FuzzSince(f *testing.F) {
	for _, text := range []string{"24h", "7d", "-1d", "NaNd", "1e300d", "all", "2026-01-31T12:00:00Z", "0001-01-01T00:00:00Z", "0000-01-01T00:00:00Z", ""} {
		f.Add(text)
	}
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		at, err := (&since{text}).time(now)
		if err != nil || at == nil {
			return
		}
		require.NoError(t, at.CheckValid())
	})
}

package auth

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/specql/mesh/gen/specql/v1"
)

// TestEveryMethodHasARole: a method without an entry is refused to everybody.
func TestEveryMethodHasARole(t *testing.T) {
	t.Parallel()
	known := map[string]bool{}
	protoregistry.GlobalFiles.RangeFilesByPackage("specql.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				name := "/" + string(s.FullName()) + "/" + string(s.Methods().Get(j).Name())
				known[name] = true
				require.NotEqual(t, NoRole, methods[name], "%s has no role in methods.go", name)
			}
		}
		return true
	})
	require.Greater(t, len(known), 15)
	for name := range methods {
		require.True(t, known[name] || name[:17] == "/grpc.reflection.", "there is no %s", name)
	}
}

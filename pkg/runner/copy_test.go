package runner

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// A configuration is looked at once, and one that is no object every time.
func TestConfigurationsAreRemembered(t *testing.T) {
	t.Parallel()
	var o objects
	for range 2 {
		for raw, want := range map[string]string{`{"a":1}`: `{"a":1}`, "": "{}", "null": "{}", ` {} `: "{}"} {
			have, err := o.configured([]byte(raw))
			require.NoError(t, err)
			require.Equal(t, want, string(have))
		}
		for _, raw := range []string{"[]", "{", `{"a":1}x`, "1"} {
			_, err := o.configured([]byte(raw))
			require.Error(t, err, raw)
		}
	}
	require.Len(t, o.seen, 1)
	for i := range 3 * objectsRemembered {
		_, err := o.configured(fmt.Appendf(nil, `{"a":%d}`, i))
		require.NoError(t, err)
		require.LessOrEqual(t, len(o.seen), objectsRemembered)
	}
	_, err := o.configured(fmt.Appendf(nil, `{"a":%q}`, strings.Repeat("x", mostRemembered)))
	require.NoError(t, err)
	for raw := range o.seen {
		require.LessOrEqual(t, len(raw), mostRemembered)
	}
}

// fill sets every field of a message, two entries in each list, and gives how many it has.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		scalar := func() protoreflect.Value {
			switch f.Kind() { //nolint:exhaustive // those that there are
			case protoreflect.StringKind:
				return protoreflect.ValueOfString(string(f.Name()))
			case protoreflect.DoubleKind:
				return protoreflect.ValueOfFloat64(float64(f.Number()) + 0.5)
			case protoreflect.Int32Kind:
				return protoreflect.ValueOfInt32(int32(f.Number()))
			case protoreflect.BoolKind:
				return protoreflect.ValueOfBool(true)
			}
			panic(f.FullName())
		}
		switch {
		case f.IsList() && f.Message() != nil && depth > 0:
			for range 2 {
				fill(m.Mutable(f).List().AppendMutable().Message(), depth-1)
			}
		case f.Message() != nil: // what is deeper is cloned
		case f.IsList():
			m.Mutable(f).List().Append(scalar())
			m.Mutable(f).List().Append(scalar())
		default:
			m.Set(f, scalar())
		}
	}
}

// A copy has all that a message has, and nothing in common with it.
func TestCopiesAreWhole(t *testing.T) {
	t.Parallel()
	usage := &runnerv1.ResourceUsage{}
	fill(usage.ProtoReflect(), 0)
	security := &runnerv1.SecurityContext{}
	fill(security.ProtoReflect(), 2)
	for _, c := range []struct{ from, to, empty, none proto.Message }{
		{usage, copyUsage(usage), &runnerv1.ResourceUsage{}, copyUsage(&runnerv1.ResourceUsage{})},
		{security, copySecurity(security), &runnerv1.SecurityContext{}, copySecurity(&runnerv1.SecurityContext{})},
	} {
		require.True(t, proto.Equal(c.from, c.to), "%v\n%v", c.from, c.to)
		require.True(t, proto.Equal(c.empty, c.none))
	}
	before := proto.Clone(security)
	to := copySecurity(security)
	to.Isolation[0], to.Checks[0].Rule, to.Checks[1].AllowedBy[0].Key = "x", "x", "x"
	require.True(t, proto.Equal(before, security))
	copied := copyUsage(usage)
	*usage.CpuSeconds, *usage.StatusCode, *usage.OomKilled, *usage.ExecutedVersion = 0, 0, false, ""
	require.True(t, *copied.CpuSeconds != 0 && *copied.StatusCode != 0 && *copied.OomKilled && *copied.ExecutedVersion != "")
}

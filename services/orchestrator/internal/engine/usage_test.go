package engine

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// fill sets each field of a message or leaves it out, by chance. what it does not know fails the test.
func fill(t *testing.T, r *rand.Rand, m protoreflect.Message, strings []string, floats []float64, depth int) {
	t.Helper()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if r.IntN(3) == 0 || depth > 4 {
			continue
		}
		value := func() protoreflect.Value {
			switch fd.Kind() {
			case protoreflect.DoubleKind:
				return protoreflect.ValueOfFloat64(floats[r.IntN(len(floats))])
			case protoreflect.Int32Kind:
				return protoreflect.ValueOfInt32([]int32{0, 1, -1, 200, math.MaxInt32, math.MinInt32}[r.IntN(6)])
			case protoreflect.BoolKind:
				return protoreflect.ValueOfBool(r.IntN(2) == 0)
			case protoreflect.StringKind:
				return protoreflect.ValueOfString(strings[r.IntN(len(strings))])
			case protoreflect.EnumKind:
				return protoreflect.ValueOfEnum(protoreflect.EnumNumber(r.IntN(100)))
			case protoreflect.MessageKind:
				v := m.NewField(fd)
				if fd.IsList() {
					v = v.List().NewElement()
				} else if fd.IsMap() {
					return v
				}
				fill(t, r, v.Message(), strings, floats, depth+1)
				return v
			}
			require.Fail(t, "a field of a kind that is not tested", "%s", fd.FullName())
			return protoreflect.Value{}
		}
		if !fd.IsList() {
			m.Set(fd, value())
			continue
		}
		list := m.Mutable(fd).List()
		for range r.IntN(4) {
			list.Append(value())
		}
	}
}

// What is stored is what protojson writes, but for the spaces that it puts in at will.
func TestUsageAndSecurityAreWrittenAsByProtojson(t *testing.T) {
	t.Parallel()
	plainTexts := []string{"", "a", "cgroup", "/usr/bin/python3 <&>", "sha256:00", "~"}
	plainFloats := []float64{0, math.Copysign(0, -1), 1, -1, 0.1, 1.5e-6, 123456789.125, 1e20, 1.0 / 3}
	hostileTexts := append([]string{"\"", "\\", "\x00", "\n\t\b\f\r", "\x7f", "é", "\u2028<script>", "😀", "\xff", "a\xc3", "\\u0000"}, plainTexts...)
	hostileFloats := append([]float64{
		math.NaN(), math.Inf(1), math.Inf(-1), 1e-6, 1e21, 9.99e-7, 1e-10, 5e-324, math.MaxFloat64, -1e300, 1e22,
	}, plainFloats...)
	for _, c := range []struct {
		name    string
		strings []string
		floats  []float64
	}{{"plain", plainTexts, plainFloats}, {"hostile", hostileTexts, hostileFloats}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same each time
			same := func(m proto.Message, got json.RawMessage) {
				want := protoJSON(m)
				if want == nil {
					require.Nil(t, got, "%v", m)
					return
				}
				var w, g bytes.Buffer
				require.NoError(t, json.Compact(&w, want))
				require.NoError(t, json.Compact(&g, got), "%s", got)
				require.Equal(t, w.String(), g.String())
			}
			for range 5000 {
				u, s := &runnerv1.ResourceUsage{}, &runnerv1.SecurityContext{}
				fill(t, r, u.ProtoReflect(), c.strings, c.floats, 0)
				same(u, usageJSON(u))
				fill(t, r, s.ProtoReflect(), c.strings, c.floats, 0)
				same(s, securityJSON(s))
			}
		})
	}
	same := &runnerv1.SecurityContext{Checks: []*runnerv1.PolicyCheck{nil, {}}}
	require.JSONEq(t, string(protoJSON(same)), string(securityJSON(same)))
}

// No figure of a runner that nothing can be counted with is kept, whichever it is.
func TestAbsurdFiguresAreDropped(t *testing.T) {
	t.Parallel()
	dropAbsurd(nil)
	fields := (&runnerv1.ResourceUsage{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if fd.Kind() != protoreflect.DoubleKind {
			continue
		}
		for v, kept := range map[float64]bool{0: true, mostUsed: true, -1e-9: false, 2 * mostUsed: false, math.Inf(1): false, math.Inf(-1): false, math.NaN(): false} {
			u := &runnerv1.ResourceUsage{}
			u.ProtoReflect().Set(fd, protoreflect.ValueOfFloat64(v))
			dropAbsurd(u)
			require.Equal(t, kept, u.ProtoReflect().Has(fd), "%s %v", fd.Name(), v)
		}
	}
}

func BenchmarkUsageJSON(b *testing.B) {
	u := &runnerv1.ResourceUsage{DurationSeconds: new(0.000123), CpuSeconds: new(0.0001), Attempts: new(int32(1)), Source: "rusage"}
	for b.Loop() {
		usageJSON(u)
	}
}

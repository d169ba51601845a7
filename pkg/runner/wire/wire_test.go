package wire

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// fill sets every field of a message and of those in it, two entries in each list and map, and the named one of each oneof.
// Fields in skip are left out, by their full names.
func fill(m protoreflect.Message, oneof protoreflect.Name, skip ...protoreflect.FullName) {
	fields := m.Descriptor().Fields()
	scalar := func(f protoreflect.FieldDescriptor, n int) protoreflect.Value {
		switch f.Kind() { //nolint:exhaustive // those that there are
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(fmt.Sprintf("%s é %d", f.FullName(), n))
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(strings.Repeat(string(f.Name()), 20)))
		case protoreflect.DoubleKind:
			return protoreflect.ValueOfFloat64(float64(f.Number()) + 0.5)
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(-int32(f.Number()))
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(-1 << f.Number())
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		}
		panic(f.FullName())
	}
	for i := range fields.Len() {
		f := fields.Get(i)
		switch in := f.ContainingOneof(); {
		case in != nil && !in.IsSynthetic() && f.Name() != oneof, slices.Contains(skip, f.FullName()):
		case f.IsMap():
			for n := range 2 {
				m.Mutable(f).Map().Set(scalar(f.MapKey(), n).MapKey(), scalar(f.MapValue(), n))
			}
		case f.IsList() && f.Message() != nil:
			for range 2 {
				fill(m.Mutable(f).List().AppendMutable().Message(), "string_value", skip...)
			}
		case f.Message() != nil:
			fill(m.Mutable(f).Message(), "string_value", skip...)
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f, 1))
			m.Mutable(f).List().Append(scalar(f, 2))
		default:
			m.Set(f, scalar(f, 0))
		}
	}
}

// filled are both messages with everything in them that there is, one for each kind of command and event.
func filled() map[string]proto.Message {
	all := map[string]proto.Message{}
	for _, empty := range []proto.Message{&runnerv1.ExecuteRequest{}, &runnerv1.ExecuteResponse{}} {
		kinds := empty.ProtoReflect().Descriptor().Fields()
		for i := range kinds.Len() {
			m := proto.Clone(empty)
			fill(m.ProtoReflect(), kinds.Get(i).Name())
			all[string(kinds.Get(i).FullName())] = m
		}
	}
	var events []*runnerv1.ExecuteResponse
	for _, kind := range []protoreflect.Name{"started", "log", "usage", "finished", "renewed", "finished", "log"} {
		m := &runnerv1.ExecuteResponse{}
		fill(m.ProtoReflect(), kind)
		events = append(events, m)
	}
	all["a batch of all"] = batch(events...)
	return all
}

func batch(events ...*runnerv1.ExecuteResponse) *runnerv1.ExecuteResponse {
	return &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Batch{Batch: &runnerv1.Batch{Events: events}}}
}

// What is encoded here is what was meant, whoever decodes it, and the other way round. A field that is new and is not encoded
// here is found by this.
func TestMessagesAreThoseOfProtobuf(t *testing.T) {
	t.Parallel()
	messages := filled()
	maps.Copy(messages, map[string]proto.Message{
		"nothing": &runnerv1.ExecuteResponse{}, "no command": &runnerv1.ExecuteRequest{},
		"nil job":      &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{}},
		"empty job":    &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: &runnerv1.Job{}}},
		"nil started":  &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Started{}},
		"nil log":      &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Log{}},
		"nil usage":    &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Usage{}},
		"nil finished": &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{}},
		"nil batch":    &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Batch{}},
		"empty batch":  batch(), "nil in a batch": batch(nil, nil), "batch in a batch": batch(batch(batch())),
		"quick job": quickJob(), "start": start(),
		"nil checks": batch(&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{Security: &runnerv1.SecurityContext{Checks: []*runnerv1.PolicyCheck{nil, {}}, Isolation: []string{"", "x"}}}}}),
		"zeros": batch(&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{
			Output: []byte{}, Usage: &runnerv1.ResourceUsage{DurationSeconds: new(0.0), StatusCode: new(int32(0)), OomKilled: new(false), ExecutedVersion: new("")},
		}}}),
		"long": batch(&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{Output: make([]byte, 3*mostByHand)}}}),
	})
	for name, m := range messages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, from := range []encoding.CodecV2{Codec(), encoding.GetCodecV2(grpcproto.Name)} {
				for _, to := range []encoding.CodecV2{Codec(), encoding.GetCodecV2(grpcproto.Name)} {
					data, err := from.Marshal(m)
					require.NoError(t, err)
					have := proto.Clone(m) // what was there before is gone
					require.NoError(t, to.Unmarshal(data, have))
					require.True(t, proto.Equal(canonical(t, m), have), "%v\n%v", m, have)
					// It may come in pieces.
					whole := data.Materialize()
					require.NoError(t, to.Unmarshal(mem.BufferSlice{mem.SliceBuffer(whole[:len(whole)/2]), mem.SliceBuffer(whole[len(whole)/2:])}, have))
					require.True(t, proto.Equal(canonical(t, m), have))
				}
			}
		})
	}
}

// canonical is a message as protobuf gives it back: without what has no form on the wire.
func canonical(t *testing.T, m proto.Message) proto.Message {
	t.Helper()
	data, err := proto.Marshal(m)
	require.NoError(t, err)
	out := m.ProtoReflect().New().Interface()
	require.NoError(t, proto.Unmarshal(data, out))
	return out
}

// The messages of quick jobs are decoded here, whatever they hold but for what is rare. A field that is new and is not decoded here is
// found by this.
func TestQuickJobsAreDecodedHere(t *testing.T) {
	t.Parallel()
	request := &runnerv1.ExecuteRequest{}
	fill(request.ProtoReflect(), "start")
	have := &runnerv1.ExecuteRequest{}
	require.True(t, decodeRequest(marshal(t, request), have))
	require.True(t, proto.Equal(request, have), "%v\n%v", request, have)
	var events []*runnerv1.ExecuteResponse
	for _, kind := range []protoreflect.Name{"started", "log", "log", "finished", "log"} {
		m := &runnerv1.ExecuteResponse{}
		fill(m.ProtoReflect(), kind, "specql.runner.v1.Finished.error", "specql.runner.v1.Finished.retry_after", "specql.runner.v1.Finished.phases", "specql.runner.v1.PolicyCheck.allowed_by")
		events = append(events, m)
	}
	told, got := batch(events...), &runnerv1.ExecuteResponse{}
	require.True(t, decodeResponse(marshal(t, told), got))
	require.True(t, proto.Equal(told, got), "%v\n%v", told, got)
}

func marshal(t testing.TB, m proto.Message) string {
	t.Helper()
	data, err := proto.Marshal(m)
	require.NoError(t, err)
	return string(data)
}

// Fields that this program does not know are kept, as protobuf does.
func TestUnknownFieldsStay(t *testing.T) {
	t.Parallel()
	unknown := protowire.AppendString(protowire.AppendTag(nil, 1000, protowire.BytesType), "new")
	var add func(m protoreflect.Message)
	add = func(m protoreflect.Message) {
		m.SetUnknown(unknown)
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case f.Message() == nil || f.IsMap():
			case f.IsList():
				for i := range v.List().Len() {
					add(v.List().Get(i).Message())
				}
			default:
				add(v.Message())
			}
			return true
		})
	}
	for name, m := range filled() {
		add(m.ProtoReflect())
		data, err := Codec().Marshal(m)
		require.NoError(t, err)
		have := m.ProtoReflect().New().Interface()
		require.NoError(t, Codec().Unmarshal(data, have))
		require.True(t, proto.Equal(m, have), "%s\n%v\n%v", name, m, have)
	}
}

// Texts that are not UTF-8 are refused, as protobuf refuses them.
func TestTextsAreUTF8(t *testing.T) {
	t.Parallel()
	for _, m := range []proto.Message{
		&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: &runnerv1.Job{Id: "\xff"}}},
		&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: &runnerv1.Job{TraceContext: map[string]string{"\xff": ""}}}},
		&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{Reason: "\xff"}}},
		batch(&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Log{Log: &runnerv1.Log{Text: "\xff"}}}),
	} {
		_, want := encoding.GetCodecV2(grpcproto.Name).Marshal(m)
		_, err := Codec().Marshal(m)
		require.Error(t, want)
		require.EqualError(t, err, want.Error())
	}
	// "\xff" as the id, and as a line.
	require.Error(t, Codec().Unmarshal(mem.BufferSlice{mem.SliceBuffer("\x0a\x03\x0a\x01\xff")}, &runnerv1.ExecuteRequest{}))
	require.Error(t, Codec().Unmarshal(mem.BufferSlice{mem.SliceBuffer("\x32\x07\x0a\x05\x12\x03\x1a\x01\xff")}, &runnerv1.ExecuteResponse{}))
}

// TestTwoEnds: what one end of a job says is not that of another in the same batch.
func TestTwoEnds(t *testing.T) {
	end := func(s *runnerv1.SecurityContext) *runnerv1.ExecuteResponse {
		return &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{Security: s}}}
	}
	sent := &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Batch{Batch: &runnerv1.Batch{Events: []*runnerv1.ExecuteResponse{
		end(&runnerv1.SecurityContext{Checks: []*runnerv1.PolicyCheck{{Rule: "allowed_domains", Subject: "other.example", Detail: "denied"}}, Isolation: []string{"seccomp"}}),
		end(&runnerv1.SecurityContext{Checks: []*runnerv1.PolicyCheck{{Rule: "other", Allowed: true}}, Isolation: []string{"none"}}),
	}}}}
	data, err := proto.Marshal(sent)
	require.NoError(t, err)
	got := &runnerv1.ExecuteResponse{}
	require.NoError(t, Codec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, got))
	require.True(t, proto.Equal(sent, got), "%v", got)
}

// FuzzDecode holds what is decoded here against protobuf: what one takes the other takes, and it is the same.
func FuzzDecode(f *testing.F) {
	for _, m := range filled() {
		f.Add([]byte(marshal(f, m)))
	}
	f.Add([]byte(marshal(f, quickJob())))
	f.Add([]byte(marshal(f, start())))
	f.Add([]byte("\x0a\x01\x00"))
	f.Add([]byte("\x0a\x0c\x3a\x00\x3a\x00\x20\xff\xff\xff\xff\xff\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, c := range []struct{ have, want proto.Message }{
			{&runnerv1.ExecuteRequest{}, &runnerv1.ExecuteRequest{}},
			{&runnerv1.ExecuteResponse{}, &runnerv1.ExecuteResponse{}},
		} {
			err, want := Codec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, c.have), proto.Unmarshal(data, c.want)
			require.Equal(t, want == nil, err == nil, "%v\n%v", want, err)
			if err != nil {
				continue
			}
			require.True(t, proto.Equal(c.want, c.have), "%v\n%v", c.want, c.have)
			again, err := Codec().Marshal(c.have)
			require.NoError(t, err)
			require.NoError(t, proto.Unmarshal(again.Materialize(), c.want))
			require.True(t, proto.Equal(c.want, c.have), "%v\n%v", c.want, c.have)
		}
	})
}

func quickJob() *runnerv1.ExecuteResponse {
	return batch(
		&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Started{Started: &runnerv1.Started{Time: timestamppb.Now(), More: true, Held: durationpb.New(123456)}}},
		&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Log{Log: &runnerv1.Log{Line: 1, Stream: "runner", Text: "GET http://127.0.0.1:36475/: 200 in 0 ms", Time: timestamppb.Now()}}},
		&runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{
			Output: []byte(`{"body":"","status_code":200,"headers":{"Content-Length":"0","Date":"Sat, 28 Nov 2026 20:33:20 GMT"}}`),
			Usage:  &runnerv1.ResourceUsage{DurationSeconds: new(0.000234), NetworkRxMb: new(0.0001), NetworkTxMb: new(0.0002), Source: "http", StatusCode: new(int32(200)), RequestBytes: new(0.0), ResponseBytes: new(0.0)},
			Security: &runnerv1.SecurityContext{
				PolicyDigest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", Runner: "http-runner@machine",
				Isolation: []string{"domain_check", "address_check", "tls_check", "hidden_process", "read_only_files"},
				Checks: []*runnerv1.PolicyCheck{
					{Rule: "allowed_domains", Subject: "127.0.0.1", Allowed: true},
					{Rule: "allow_private_networks", Subject: "127.0.0.1:36475", Allowed: true},
					{Rule: "max_response_size", Subject: "0 bytes", Allowed: true},
				},
			},
		}}},
	)
}

func start() *runnerv1.ExecuteRequest {
	return &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: &runnerv1.Job{
		Id: "0191f3a4-1111-7000-8000-000000000001", RunId: "0191f3a4-1111-7000-8000-000000000000", StepPath: "steps[0]", Attempt: 1, IdempotencyKey: "0191f3a4-1111-7000-8000-000000000001", Epoch: 3,
		Service:   &runnerv1.Service{Name: "nothing", ExecutionType: "http", RunnerConfig: []byte(`{"base_url":"http://127.0.0.1:36475"}`), SecurityPolicy: []byte(`{"allow_private_networks":true}`)},
		Operation: &runnerv1.Operation{Name: "nothing", Config: []byte(`{"method":"GET","path":"/"}`)}, Input: []byte(`{}`), Timeout: durationpb.New(30e9), Lease: durationpb.New(6e9), More: true, Batch: true,
	}}}
}

// BenchmarkCodec compares with protobuf.
func BenchmarkCodec(b *testing.B) {
	for _, how := range []struct {
		name  string
		codec encoding.CodecV2
	}{{"protobuf", encoding.GetCodecV2(grpcproto.Name)}, {"here", Codec()}} {
		for _, c := range []struct {
			name string
			m    proto.Message
		}{{"start", start()}, {"quick_job", quickJob()}} {
			data, err := how.codec.Marshal(c.m)
			require.NoError(b, err)
			b.Run(how.name+"/encode_"+c.name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := how.codec.Marshal(c.m); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run(how.name+"/decode_"+c.name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if err := how.codec.Unmarshal(data, c.m.ProtoReflect().New().Interface()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

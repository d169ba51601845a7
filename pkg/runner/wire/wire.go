// Package wire encodes and decodes the two messages that each job costs, its start and what a runner tells of it, without
// reflection and in few pieces of memory. Both are a noticeable part of what a quick job takes. The bytes are those of
// protobuf: a peer does not see which of the two wrote them, and whatever is unusual is left to protobuf itself.
package wire

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// mostByHand is the longest message, in bytes, that is decoded here: the texts of what a runner tells share one piece of
// memory, which lives as long as any of them. What is longer is mostly payload, which costs the same everywhere.
const mostByHand = 8 << 10

// Codec is gRPC's codec for protobuf, which it is for all other messages.
func Codec() encoding.CodecV2 { return codec{encoding.GetCodecV2(proto.Name)} }

type codec struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	e := encoder{b: make([]byte, 0, roomOf(v))}
	switch m := v.(type) {
	case *runnerv1.ExecuteRequest:
		e.request(m)
	case *runnerv1.ExecuteResponse:
		e.response(m)
	default:
		return c.CodecV2.Marshal(v) //nolint:wrapcheck // gRPC's own
	}
	if e.odd {
		return c.CodecV2.Marshal(v) //nolint:wrapcheck // as above
	}
	return mem.BufferSlice{mem.SliceBuffer(e.b)}, nil
}

// roomOf is about how long a message gets.
func roomOf(v any) int {
	const rest = 512
	switch m := v.(type) {
	case *runnerv1.ExecuteRequest:
		s := m.GetStart()
		return rest + len(s.GetInput()) + len(s.GetService().GetRunnerConfig()) + len(s.GetService().GetSecurityPolicy()) + len(s.GetOperation().GetConfig())
	case *runnerv1.ExecuteResponse:
		n := rest + len(m.GetFinished().GetOutput()) + len(m.GetLog().GetText())
		for _, e := range m.GetBatch().GetEvents() {
			n += len(e.GetFinished().GetOutput()) + len(e.GetLog().GetText())
		}
		return n
	}
	return 0
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if n := data.Len(); n > 0 && n <= mostByHand {
		switch m := v.(type) {
		case *runnerv1.ExecuteRequest:
			if decodeRequest(text(data), m) {
				return nil
			}
		case *runnerv1.ExecuteResponse:
			if decodeResponse(text(data), m) {
				return nil
			}
		}
	}
	return c.CodecV2.Unmarshal(data, v) //nolint:wrapcheck // gRPC's own
}

func text(data mem.BufferSlice) string {
	if len(data) == 1 {
		return string(data[0].ReadOnlyData())
	}
	return string(data.Materialize())
}

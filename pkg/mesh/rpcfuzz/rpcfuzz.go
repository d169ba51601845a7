// Package rpcfuzz sends hostile bytes to the methods of a gRPC service over a real connection, for fuzz targets.
package rpcfuzz

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/specql/mesh/pkg/fault"
)

// Options say how a service is fuzzed.
type Options struct {
	// Seeds are valid requests by method name; a method whose requests are a stream takes up to two.
	Seeds map[string][][]proto.Message
	// Timeout bounds a call; 300 ms if zero. That it passes is no failure.
	Timeout time.Duration
	// Check judges a response. An error is a failure.
	Check func(method string, response []byte) error
	// Allow says which errors a method may answer besides; nil for none.
	Allow func(method string, err error) bool
}

// Service fuzzes every method of a service: each gets bytes that are a message, or are none. The answer has to be
// one for the request: nothing panics, and nothing is INTERNAL, UNKNOWN or UNIMPLEMENTED.
func Service(f *testing.F, conn grpc.ClientConnInterface, service protoreflect.ServiceDescriptor, o Options) {
	f.Helper()
	if o.Timeout == 0 {
		o.Timeout = 300 * time.Millisecond
	}
	methods := service.Methods()
	for i := range methods.Len() {
		f.Add(uint8(i), []byte{}, []byte{})            //nolint:gosec // few methods
		f.Add(uint8(i), []byte{0xff, 0x01}, []byte{0}) //nolint:gosec // few methods
		for _, seed := range o.Seeds[string(methods.Get(i).Name())] {
			frames := [2][]byte{}
			for n, m := range seed {
				raw, err := proto.Marshal(m)
				if err != nil {
					f.Fatal(err)
				}
				frames[n] = raw
			}
			f.Add(uint8(i), frames[0], frames[1]) //nolint:gosec // few methods
		}
	}
	f.Fuzz(func(t *testing.T, method uint8, first, second []byte) {
		m := methods.Get(int(method) % methods.Len())
		ctx, cancel := context.WithTimeout(t.Context(), o.Timeout)
		defer cancel()
		responses, err := call(ctx, conn, m, first, second)
		if err := judge(err); err != nil && (o.Allow == nil || !o.Allow(string(m.Name()), err)) {
			t.Fatalf("%s: %v", m.FullName(), err)
		}
		for _, r := range responses {
			if o.Check == nil {
				break
			}
			if err := o.Check(string(m.Name()), r); err != nil {
				t.Fatalf("%s: %v", m.FullName(), err)
			}
		}
	})
}

// call sends one request, or two where the method takes a stream, and reads the answers.
func call(ctx context.Context, conn grpc.ClientConnInterface, m protoreflect.MethodDescriptor, first, second []byte) ([][]byte, error) {
	name := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		var answer frame
		err := conn.Invoke(ctx, name, &frame{first}, &answer, grpc.ForceCodec(bytesCodec{}))
		if err != nil {
			return nil, err
		}
		return [][]byte{answer.bytes}, nil
	}
	desc := &grpc.StreamDesc{ClientStreams: m.IsStreamingClient(), ServerStreams: m.IsStreamingServer()}
	stream, err := conn.NewStream(ctx, desc, name, grpc.ForceCodec(bytesCodec{}))
	if err != nil {
		return nil, err
	}
	frames := []*frame{{first}}
	if m.IsStreamingClient() {
		frames = append(frames, &frame{second})
	}
	for _, f := range frames {
		if err := stream.SendMsg(f); err != nil {
			break // RecvMsg has the reason
		}
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	var all [][]byte
	for {
		var answer frame
		switch err := stream.RecvMsg(&answer); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return all, err
		}
		all = append(all, answer.bytes)
	}
}

// judge says whether a call may end so.
func judge(err error) error {
	if err == nil {
		return nil
	}
	st := fault.ToStatus(err)
	bad := []codes.Code{codes.Internal, codes.Unknown, codes.Unimplemented, codes.DataLoss}
	if slices.Contains(bad, st.Code()) && !strings.Contains(st.Message(), "unmarshal") {
		return fmt.Errorf("answers %s: %s", st.Code(), st.Message())
	}
	return nil
}

// frame is a message that is not looked into.
type frame struct{ bytes []byte }

// bytesCodec sends frames as they are.
type bytesCodec struct{}

// Marshal implements encoding.Codec.
func (bytesCodec) Marshal(v any) ([]byte, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("%T is no frame", v)
	}
	return f.bytes, nil
}

// Unmarshal implements encoding.Codec.
func (bytesCodec) Unmarshal(data []byte, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("%T is no frame", v)
	}
	f.bytes = slices.Clone(data)
	return nil
}

// Name implements encoding.Codec: servers see protobuf.
func (bytesCodec) Name() string { return "proto" }

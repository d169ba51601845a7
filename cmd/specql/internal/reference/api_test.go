package main

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// compiled are the protos that the program was built with: all but their comments.
func compiled() *descriptorpb.FileDescriptorSet {
	set, seen := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
	var add func(f protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	for _, f := range []protoreflect.FileDescriptor{
		specqlv1.File_specql_v1_orchestrator_proto, specqlv1.File_specql_v1_registry_proto, specqlv1.File_specql_v1_insight_proto, runnerv1.File_specql_runner_v1_runner_proto,
	} {
		add(f)
	}
	return set
}

func TestThePageHasTheWholeAPI(t *testing.T) {
	set := compiled()
	_, err := apiPage(set)
	require.ErrorContains(t, err, "no comments")
	for _, f := range set.GetFile() {
		f.SourceCodeInfo = &descriptorpb.SourceCodeInfo{Location: []*descriptorpb.SourceCodeInfo_Location{{Span: []int32{0, 0, 0}}}}
	}
	page, err := apiPage(set)
	require.NoError(t, err)
	written, err := os.ReadFile("../../../../docs/reference/api.md")
	require.NoError(t, err)
	rows := 0
	for line := range strings.SplitSeq(string(page), "\n") {
		if strings.HasPrefix(line, "| `") || strings.HasPrefix(line, "### ") {
			rows++
			require.Contains(t, string(written), strings.TrimSuffix(line, " |"), "run 'make generate' and commit docs/reference/api.md")
		}
	}
	require.Greater(t, rows, 200)
	require.NotContains(t, string(written), "|  |\n", "everything has a comment")
}

func TestCommentsAreNoMarkup(t *testing.T) {
	file := &descriptorpb.FileDescriptorProto{
		Name: new("x.proto"), Package: new("specql.x"), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{Name: new("M"), Field: []*descriptorpb.FieldDescriptorProto{{
			Name: new("f"), Number: new(int32(7)), JsonName: new("f"),
			Type: descriptorpb.FieldDescriptorProto_TYPE_STRING.Enum(), Label: descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
		}}}},
		SourceCodeInfo: &descriptorpb.SourceCodeInfo{Location: []*descriptorpb.SourceCodeInfo_Location{
			{Path: []int32{4, 0, 2, 0}, Span: []int32{0, 0, 0}, LeadingComments: new(" <script> a|b *_env_var,\n `*` [x](y)\n")},
		}},
	}
	page, err := apiPage(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{file}})
	require.NoError(t, err)
	require.Contains(t, string(page), "| `f` | 7 | string | &lt;script> a\\|b \\*_env_var, `*` \\[x](y) |\n")
	_, err = apiPage(&descriptorpb.FileDescriptorSet{})
	require.ErrorContains(t, err, "no package below specql")
}

package fault_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
)

func TestEveryCodeCrossesTheWire(t *testing.T) {
	t.Parallel()
	seen := map[fault.Code]bool{}
	for _, code := range fault.Codes() {
		require.False(t, seen[code])
		seen[code] = true
		for _, retryable := range []bool{false, true} {
			sent := &fault.Error{
				Code: code, Message: "text of " + string(code), Retryable: retryable, RetryAfter: 1500 * time.Millisecond,
				Violations: []fault.Violation{{Field: "a.b", Description: "is bad"}},
				Cause:      errors.New("stays"),
			}
			got := fault.FromError(fault.ToStatus(fmt.Errorf("outer: %w", sent)).Err())
			require.Equal(t, code, got.Code)
			require.Equal(t, sent.Message, got.Message)
			require.Equal(t, retryable, got.Retryable)
			require.Equal(t, sent.RetryAfter, got.RetryAfter)
			require.Equal(t, sent.Violations, got.Violations)
			require.NotContains(t, got.Cause.Error(), "stays")

			stored := fault.FromProto(sent.ToProto())
			require.Equal(t, code, stored.Code)
			require.Equal(t, retryable, stored.Retryable)
		}
	}
	require.Len(t, seen, 11)
}

func TestRetryable(t *testing.T) {
	t.Parallel()
	for _, code := range fault.Codes() {
		want := code == fault.Timeout || code == fault.RateLimited || code == fault.Unavailable
		require.Equal(t, want, fault.New(code, "x").Retryable, code)
	}
}

func TestErrorsWithoutACode(t *testing.T) {
	t.Parallel()
	require.Nil(t, fault.From(nil))
	require.NoError(t, fault.ToStatus(nil).Err())
	require.Nil(t, fault.FromProto(nil))
	require.Nil(t, (*fault.Error)(nil).ToProto())
	require.Equal(t, fault.Timeout, fault.From(fmt.Errorf("x: %w", context.DeadlineExceeded)).Code)
	require.Equal(t, fault.Cancelled, fault.From(context.Canceled).Code)
	require.Equal(t, fault.Internal, fault.From(errors.New("x")).Code)
	require.Equal(t, fault.Internal, fault.FromProto(&runnerv1.Error{Code: "NO_SUCH"}).Code)

	// The text of an error without a code may hold anything: it is not sent.
	st := fault.ToStatus(errors.New("password=hunter2"))
	require.Equal(t, codes.Internal, st.Code())
	require.NotContains(t, st.String(), "hunter2")
	// A status stays as it is.
	require.Equal(t, codes.NotFound, fault.ToStatus(status.Error(codes.NotFound, "none")).Code())
}

func TestCodesOfOtherPeoplesStatus(t *testing.T) {
	t.Parallel()
	for code, want := range map[codes.Code]fault.Code{
		codes.InvalidArgument: fault.Validation, codes.NotFound: fault.Validation, codes.PermissionDenied: fault.PolicyViolation,
		codes.ResourceExhausted: fault.RateLimited, codes.DeadlineExceeded: fault.Timeout, codes.Unavailable: fault.Unavailable,
		codes.Canceled: fault.Cancelled, codes.Unknown: fault.Internal, codes.Unimplemented: fault.Internal,
	} {
		got := fault.FromError(status.Error(code, "x"))
		require.Equal(t, want, got.Code, code)
		require.Equal(t, code, status.Code(got), "the status is still to be had")
	}
}

func TestWrap(t *testing.T) {
	t.Parallel()
	inner := errors.New("inner")
	err := fault.Wrap(inner, fault.RemoteError, "status %d", 502)
	require.ErrorIs(t, err, inner)
	require.EqualError(t, err, "REMOTE_ERROR: status 502")
	got, ok := fault.As(fmt.Errorf("x: %w", err))
	require.True(t, ok)
	require.Same(t, err, got)
	_, ok = fault.As(inner)
	require.False(t, ok)
}

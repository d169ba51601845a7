// Package fault holds the error codes of the system and carries them over gRPC.
//
// An error is raised once, as a *Error, and crosses every wire through this package:
// [ToStatus] turns it into a gRPC status with a google.rpc.ErrorInfo, [FromError] turns
// such a status back into the same code.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// Code says what kind of failure an error is.
type Code string

// The codes of jobs and runs.
const (
	// Validation: the input, the output or the workflow breaks a rule.
	Validation Code = "VALIDATION"
	// PolicyViolation: a security policy forbids what would have happened.
	PolicyViolation Code = "POLICY_VIOLATION"
	// RateLimited: too many calls in a time; may be retried.
	RateLimited Code = "RATE_LIMITED"
	// BudgetExceeded: the spend allowed is used up.
	BudgetExceeded Code = "BUDGET_EXCEEDED"
	// Timeout: an attempt took longer than it may; may be retried.
	Timeout Code = "TIMEOUT"
	// ResourceExceeded: the job used more than its limits.
	ResourceExceeded Code = "RESOURCE_EXCEEDED"
	// RemoteError: the target answered with an error. Retried where the target's answer allows it.
	RemoteError Code = "REMOTE_ERROR"
	// Unavailable: the target or a runner could not be reached; may be retried.
	Unavailable Code = "UNAVAILABLE"
	// Cancelled: someone asked for the end.
	Cancelled Code = "CANCELLED"
	// Disabled: the execution type is switched off.
	Disabled Code = "DISABLED"
	// Internal: a defect or a broken part of this system.
	Internal Code = "INTERNAL"
)

// Codes are all codes, in the order of the documentation.
func Codes() []Code {
	return []Code{
		Validation, PolicyViolation, RateLimited, BudgetExceeded, Timeout, ResourceExceeded,
		RemoteError, Unavailable, Cancelled, Disabled, Internal,
	}
}

// retryable codes may succeed when called again. RemoteError decides case by case.
func (c Code) retryable() bool {
	return c == Timeout || c == RateLimited || c == Unavailable
}

// Domain is the domain of the google.rpc.ErrorInfo details.
const Domain = "specql.dev"

// Error is a failure with its code. Message is for people, says the mend where there is
// one, and holds no secret. Cause is for logs alone and never crosses a wire.
type Error struct {
	Code    Code
	Message string
	// Retryable says whether the same call could succeed later.
	Retryable bool
	// RetryAfter is how long the target asked to be left alone; zero if it did not.
	RetryAfter time.Duration
	// Attempts is how many attempts were made; zero outside the orchestrator.
	Attempts int
	// Violations names the fields of a bad request, where the error is about one.
	Violations []Violation
	Cause      error
}

// Violation is one field of a request that breaks a rule.
type Violation struct {
	Field       string
	Description string
}

// New makes an error. Whether it is retryable follows from the code.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Retryable: code.retryable()}
}

// Wrap makes an error that remembers its cause. The cause's text is not part of the message.
func Wrap(cause error, code Code, format string, args ...any) *Error {
	e := New(code, format, args...)
	e.Cause = cause
	return e
}

// Error implements error as "CODE: message".
func (e *Error) Error() string { return string(e.Code) + ": " + e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// As finds the *Error in an error's chain.
func As(err error) (*Error, bool) {
	var f *Error
	ok := errors.As(err, &f)
	return f, ok
}

// From gives any error a code: a *Error keeps its own, a context's end is Timeout or
// Cancelled, a gRPC status is read by [FromError], the rest is Internal.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	if f, ok := As(err); ok {
		return f
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return Wrap(err, Timeout, "the deadline passed")
	case errors.Is(err, context.Canceled):
		return Wrap(err, Cancelled, "cancelled")
	}
	if _, ok := status.FromError(err); ok {
		return FromError(err)
	}
	return Wrap(err, Internal, "internal error: %v", err)
}

// ToProto gives the form that is stored and shown.
func (e *Error) ToProto() *runnerv1.Error {
	if e == nil {
		return nil
	}
	return &runnerv1.Error{Code: string(e.Code), Message: e.Message, Retryable: e.Retryable, Attempts: int32(e.Attempts)} //nolint:gosec // attempts are bounded
}

// FromProto is the reverse of [Error.ToProto]; an unknown code is Internal.
func FromProto(p *runnerv1.Error) *Error {
	if p == nil {
		return nil
	}
	code := Internal
	for _, c := range Codes() {
		if string(c) == p.GetCode() {
			code = c
		}
	}
	return &Error{Code: code, Message: p.GetMessage(), Retryable: p.GetRetryable(), Attempts: int(p.GetAttempts())}
}

// grpcCode is the gRPC code that carries a code.
func (c Code) grpcCode() codes.Code {
	switch c {
	case Validation:
		return codes.InvalidArgument
	case PolicyViolation:
		return codes.PermissionDenied
	case RateLimited, BudgetExceeded, ResourceExceeded:
		return codes.ResourceExhausted
	case Timeout:
		return codes.DeadlineExceeded
	case RemoteError:
		return codes.Unknown
	case Unavailable:
		return codes.Unavailable
	case Cancelled:
		return codes.Canceled
	case Disabled:
		return codes.FailedPrecondition
	case Internal:
		return codes.Internal
	}
	return codes.Internal
}

// ToStatus gives the gRPC status that carries an error: ErrorInfo with the code as reason,
// BadRequest with the violations, RetryInfo with the time to wait. An error that already
// is a status stays as it is. The text of an error without a code is not sent.
func ToStatus(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	f, ok := As(err)
	if !ok {
		if st, isStatus := status.FromError(err); isStatus {
			return st
		}
		f = From(err)
		if f.Code == Internal {
			f = &Error{Code: Internal, Message: "internal error; the service's log has the cause"}
		}
	}
	st := status.New(f.Code.grpcCode(), f.Message)
	info := &errdetails.ErrorInfo{
		Reason: string(f.Code), Domain: Domain,
		Metadata: map[string]string{"retryable": strconv.FormatBool(f.Retryable)},
	}
	withInfo, err := st.WithDetails(info)
	if err != nil {
		return st
	}
	st = withInfo
	if len(f.Violations) > 0 {
		bad := &errdetails.BadRequest{}
		for _, v := range f.Violations {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: v.Field, Description: v.Description})
		}
		if s, err := st.WithDetails(bad); err == nil {
			st = s
		}
	}
	if f.RetryAfter > 0 {
		if s, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(f.RetryAfter)}); err == nil {
			st = s
		}
	}
	return st
}

// FromError reads a gRPC error back. Without an ErrorInfo of ours the code follows from
// the gRPC code.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	if f, ok := As(err); ok {
		return f
	}
	st, ok := status.FromError(err)
	if !ok {
		return From(err)
	}
	f := &Error{Code: codeOf(st.Code()), Message: st.Message(), Cause: err}
	f.Retryable = f.Code.retryable()
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != Domain {
				continue
			}
			f.Code = FromProto(&runnerv1.Error{Code: d.GetReason()}).Code
			f.Retryable = d.GetMetadata()["retryable"] == "true"
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				f.Violations = append(f.Violations, Violation{Field: v.GetField(), Description: v.GetDescription()})
			}
		case *errdetails.RetryInfo:
			f.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	return f
}

func codeOf(c codes.Code) Code {
	switch c { //nolint:exhaustive // the rest is Internal
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.OutOfRange:
		return Validation
	case codes.PermissionDenied, codes.Unauthenticated:
		return PolicyViolation
	case codes.ResourceExhausted:
		return RateLimited
	case codes.DeadlineExceeded:
		return Timeout
	case codes.Unavailable, codes.Aborted:
		return Unavailable
	case codes.Canceled:
		return Cancelled
	}
	return Internal
}

package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// The states that the triggers and functions of the migrations raise.
const (
	codeState  = "SQ001" // a state would move backwards
	codeExpect = "SQ002" // a statement changed other rows than it meant to
)

// Other states that mean something here.
const (
	codeUnique      = "23505"
	codeForeignKey  = "23503"
	codeNotNull     = "23502"
	codeSerialize   = "40001"
	codeDeadlock    = "40P01"
	codeLockTimeout = "55P03"
	codeCancelled   = "57014"
	codeReadOnly    = "25006"
)

// recordError is what is wrong with one record, in contrast to the whole transaction.
type recordError struct{ err error }

func (e *recordError) Error() string { return e.err.Error() }
func (e *recordError) Unwrap() error { return e.err }

// invalid makes a recordError.
func invalid(err error) error { return &recordError{err} }

func invalidf(format string, args ...any) error { return invalid(fmt.Errorf(format, args...)) }

// raised reports whether a trigger or a function raised an error by itself, with whatever code it liked.
func raised(e *pgconn.PgError) bool { return e.Routine == "exec_stmt_raise" }

// isLocked reports whether the server waited in vain for a lock that another client holds.
func isLocked(err error) bool {
	e, ok := ofServer(err)
	return ok && e.Code == codeLockTimeout && !raised(e)
}

// ofServer finds what the server said.
func ofServer(err error) (*pgconn.PgError, bool) { return errors.AsType[*pgconn.PgError](err) }

// unavailable reports whether a failure may pass by itself: the server cannot be reached, is
// starting or stopping, has no room, or others were in the way.
func unavailable(err error) bool {
	if e, ok := ofServer(err); ok {
		if raised(e) {
			return false
		}
		switch e.Code {
		case codeSerialize, codeDeadlock, codeLockTimeout, codeCancelled, codeReadOnly, "58030", "25P03", "25P04":
			return true
		}
		switch e.Code[:min(2, len(e.Code))] {
		case "08", "53", "57":
			return true
		}
		return false
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	return pgconn.SafeToRetry(err) || pgconn.Timeout(err) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		strings.Contains(err.Error(), "conn closed")
}

// outcome words a failure for the caller: his context's end is his own, a broken connection is ErrUnavailable.
func (s *Store) outcome(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	case errors.Is(err, puddle.ErrClosedPool):
		return store.ErrClosed
	case unavailable(err):
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return err
}

// ofRecord reports whether the server refused what a record holds, rather than to work at all. What a trigger of
// an entity's table may raise is any code there is.
func ofRecord(err error) bool {
	if _, ok := errors.AsType[*recordError](err); ok {
		return true
	}
	_, ok := ofServer(err)
	return ok && !unavailable(err)
}

// asRowError words the refusal of an entity's row for the person who wrote the workflow.
func asRowError(entity, id string, err error) error {
	e, ok := ofServer(err)
	if !ok {
		return err
	}
	switch e.Code {
	case codeUnique:
		if strings.Contains(e.ConstraintName, "pkey") {
			return fault.Wrap(err, fault.Validation, "%s %s exists already", entity, id)
		}
		return fault.Wrap(err, fault.Validation, "%s %s: another row has the same values in a unique index: %s", entity, id, e.ConstraintName)
	case codeNotNull:
		return fault.Wrap(err, fault.Validation, "%s %s: a required field has no value: %s", entity, id, e.ColumnName)
	case codeForeignKey:
		return fault.Wrap(err, fault.Validation, "%s %s: a reference leads nowhere, or is still needed: %s", entity, id, e.ConstraintName)
	}
	return fault.Wrap(err, fault.Validation, "%s %s: the table does not take the row: %s", entity, id, e.Message)
}

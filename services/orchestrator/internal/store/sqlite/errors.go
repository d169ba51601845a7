package sqlite

import (
	"errors"
	"fmt"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// recordError is what is wrong with one record, in contrast to the whole transaction.
type recordError struct{ err error }

func (e *recordError) Error() string { return e.err.Error() }
func (e *recordError) Unwrap() error { return e.err }

// invalid makes a recordError.
func invalid(err error) error { return &recordError{err} }

func invalidf(format string, args ...any) error { return invalid(fmt.Errorf(format, args...)) }

// asRecordError tells an error of one record from one of the whole transaction, such as a
// full disk. What SQLite refuses for what a row holds is the record's error.
func asRecordError(err error) (error, bool) {
	if r, ok := errors.AsType[*recordError](err); ok {
		return r.err, true
	}
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return nil, false
	}
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_TRIGGER:
		// The two kinds of refusal that the triggers of the migrations raise.
		return fmt.Errorf("%w: %s", store.ErrState, reason(e)), true
	case sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_ROWID:
		return fmt.Errorf("%w: it exists already: %s", store.ErrState, reason(e)), true
	case sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
		return fmt.Errorf("%w: %s", store.ErrNotFound, reason(e)), true
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_RANGE:
		return fmt.Errorf("%w: %w", store.ErrRefused, err), true
	}
	return nil, false
}

// exists reports whether a row was refused since its primary key is there already.
func exists(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_ROWID:
		return true
	case sqlite3.SQLITE_CONSTRAINT_TRIGGER:
		return strings.HasPrefix(reason(e), "exists: ")
	}
	return false
}

// asRowError words the refusal of an entity's row for the person who wrote the workflow.
func asRowError(entity, id string, err error) error {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_ROWID:
		return invalid(fault.Wrap(err, fault.Validation, "%s %s exists already", entity, id))
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE:
		return invalid(fault.Wrap(err, fault.Validation, "%s %s: another row has the same values in a unique index: %s", entity, id, reason(e)))
	case sqlite3.SQLITE_CONSTRAINT_NOTNULL:
		return invalid(fault.Wrap(err, fault.Validation, "%s %s: a required field has no value: %s", entity, id, reason(e)))
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG:
		return invalid(fault.Wrap(err, fault.Validation, "%s %s: the table does not take the row: %s", entity, id, reason(e)))
	}
	return err
}

// reason is the text of a constraint without SQLite's own words around it.
func reason(e *sqlite.Error) string {
	text := e.Error()
	if i := strings.LastIndex(text, "constraint failed: "); i >= 0 {
		text = text[i+len("constraint failed: "):]
	}
	if i := strings.LastIndex(text, " ("); i >= 0 {
		text = text[:i]
	}
	return text
}

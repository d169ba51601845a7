package postgres

import (
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// uuidValue is a UUID as a parameter; null where the text is none.
func uuidValue(text string) pgtype.UUID {
	id, err := uuid.Parse(text)
	if err != nil || len(text) != 36 {
		return pgtype.UUID{}
	}
	return pgtype.UUID{Bytes: id, Valid: true}
}

func isUUID(text string) bool { return uuidValue(text).Valid }

// sameUUID is a UUID that reads as it was written; null for any other text, which would come back changed or not at all.
func sameUUID(text string) pgtype.UUID {
	if v := uuidValue(text); v.Valid && uuid.UUID(v.Bytes).String() == text {
		return v
	}
	return pgtype.UUID{}
}

// plain takes out of a text what PostgreSQL's text cannot hold: NUL, and what is no UTF-8. For texts of
// programs and people, such as log lines and messages, where the rest is worth more than none.
func plain(text string) string {
	if !strings.Contains(text, "\x00") && utf8.ValidString(text) {
		return text
	}
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

// nullText is a text; null where it is empty.
func nullText(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}

func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// nullJSON is a JSON text; null where it is empty.
func nullJSON(j json.RawMessage) []byte {
	if len(j) == 0 {
		return nil
	}
	return j
}

// moment is a time as it is read, which may be null.
type moment = pgtype.Timestamptz

// utc is the time that was read; zero where it is null, or none that the rest of the world can write: infinity, or beyond the years 1 to 9999.
func utc(m moment) time.Time {
	if t := m.Time.UTC(); m.Valid && m.InfinityModifier == pgtype.Finite && t.Year() >= 1 && t.Year() <= 9999 {
		return t
	}
	return time.Time{}
}

// errColumns are the four columns of an error, as they are read.
type errColumns struct {
	code, message string
	retryable     bool
	attempts      int
}

func (c *errColumns) err() *fault.Error {
	if c.code == "" && c.message == "" {
		return nil
	}
	e := &fault.Error{Code: fault.Code(c.code), Message: c.message, Retryable: c.retryable, Attempts: c.attempts}
	if e.Code == "" {
		e.Code = fault.Internal
	}
	return e
}

// seconds is a duration; null for none.
func seconds(d time.Duration) *float64 {
	if d <= 0 {
		return nil
	}
	return new(d.Seconds())
}

// jobSeconds is the time from a job's start to its end, once both are known.
func jobSeconds(j *store.Job) *float64 {
	if j.StartedAt.IsZero() || j.CompletedAt.IsZero() {
		return nil
	}
	return new(max(j.CompletedAt.Sub(j.StartedAt), 0).Seconds())
}

// Package page paginates lists. A cursor names the last row of a page. It is opaque to
// callers and validated when it comes back.
package page

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// end is later than everything.
var end = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

func invalid() error { return fault.New(fault.InvalidArgument, "cursor: does not belong to this list") }

// Cut returns at most limit rows and the cursor of the next page ("": none). Query
// limit+1 rows for it.
func Cut[T any](rows []T, limit int, cursor func(T) string) ([]T, string) {
	if len(rows) <= limit {
		return rows, ""
	}
	return rows[:limit], cursor(rows[limit-1])
}

// Time returns the cursor of a row in a list that is sorted by time.
func Time(at time.Time, id uuid.UUID) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(at.UnixMicro()))
	return base64.RawURLEncoding.EncodeToString(append(b, id[:]...))
}

// Newest parses a cursor of [Time] for a list sorted newest first: the page has the rows
// before it. Without a cursor, it has all rows.
func Newest(cursor string) (time.Time, uuid.UUID, error) {
	if cursor == "" {
		return end, uuid.Max, nil
	}
	return parse(cursor, end)
}

// Before is [Newest] for a list that has only rows before a time, if that is not zero.
func Before(cursor string, until time.Time) (time.Time, uuid.UUID, error) {
	if until.IsZero() {
		return Newest(cursor)
	}
	if cursor == "" {
		return until, uuid.Nil, nil
	}
	return parse(cursor, until)
}

// Oldest is [Newest] for a list sorted oldest first: the page has the rows after it.
func Oldest(cursor string) (time.Time, uuid.UUID, error) {
	if cursor == "" {
		return time.Unix(0, 0), uuid.Nil, nil
	}
	return parse(cursor, end)
}

// parse parses a cursor of [Time] for a row that is not later than latest.
func parse(cursor string, latest time.Time) (time.Time, uuid.UUID, error) {
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || len(raw) != 24 {
		return end, uuid.Nil, invalid()
	}
	micros := int64(binary.BigEndian.Uint64(raw))
	if micros < 0 || micros > latest.UnixMicro() {
		return end, uuid.Nil, invalid()
	}
	return time.UnixMicro(micros), uuid.UUID(raw[8:]), nil
}

// Text returns the cursor of a row in a list that is sorted by text.
func Text(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// After parses a cursor of [Text] ("" for none).
func After(cursor string) (string, error) {
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || !utf8.Valid(raw) || bytes.IndexByte(raw, 0) >= 0 {
		return "", invalid()
	}
	return string(raw), nil
}

// AfterID parses a cursor of [Text] for a UUID.
func AfterID(cursor string) (uuid.UUID, error) {
	s, err := After(cursor)
	if err != nil || s == "" {
		return uuid.Nil, err
	}
	u, err := uuid.Parse(s)
	if err != nil {
		return uuid.Nil, invalid()
	}
	return u, nil
}

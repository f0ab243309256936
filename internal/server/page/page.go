// Package page cuts lists into pages. A cursor is where a page ended: opaque
// to callers, checked when it comes back.
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

func invalid() error { return fault.New(fault.InvalidArgument, "cursor: not one of this list") }

// Cut returns at most limit of rows, of which one more than that was asked
// for, and the cursor of what follows ("": nothing).
func Cut[T any](rows []T, limit int, cursor func(T) string) ([]T, string) {
	if len(rows) <= limit {
		return rows, ""
	}
	return rows[:limit], cursor(rows[limit-1])
}

// Time is the cursor of a row in a list that is sorted by time.
func Time(at time.Time, id uuid.UUID) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(at.UnixMicro()))
	return base64.RawURLEncoding.EncodeToString(append(b, id[:]...))
}

// Newest reads a cursor that Time made, in a list with the newest first: the
// page has what comes before. Without a cursor that is everything.
func Newest(cursor string) (time.Time, uuid.UUID, error) {
	if cursor == "" {
		return end, uuid.Max, nil
	}
	return parse(cursor, end)
}

// Before is Newest for a list that has only what is from before a time, if that
// is not zero.
func Before(cursor string, until time.Time) (time.Time, uuid.UUID, error) {
	if until.IsZero() {
		return Newest(cursor)
	}
	if cursor == "" {
		return until, uuid.Nil, nil
	}
	return parse(cursor, until)
}

// Oldest is Newest for a list with the oldest first: the page has what comes after.
func Oldest(cursor string) (time.Time, uuid.UUID, error) {
	if cursor == "" {
		return time.Unix(0, 0), uuid.Nil, nil
	}
	return parse(cursor, end)
}

// parse reads a cursor that Time made of a row that is not later than latest.
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

// Text is the cursor of a row in a list that is sorted by text.
func Text(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// After reads a cursor that Text made ("" for none).
func After(cursor string) (string, error) {
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || !utf8.Valid(raw) || bytes.IndexByte(raw, 0) >= 0 {
		return "", invalid()
	}
	return string(raw), nil
}

// AfterID reads a cursor that Text made of an id's text.
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

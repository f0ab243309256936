// Package id converts between UUIDs, which Wrenn uses internally, and the text that
// clients see: a prefix for the kind, and the UUID as 25 digits in lowercase base 36.
package id

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strings"

	"github.com/google/uuid"
)

// Kind is the kind of object that an id names. Its value is the prefix of the text.
type Kind string

// The kinds of id.
const (
	Sandbox  Kind = "cl-"
	Team     Kind = "tm-"
	User     Kind = "usr-"
	Host     Kind = "hst-"
	Template Kind = "tpl-"
	Build    Kind = "bld-"
	APIKey   Kind = "key-"
	Channel  Kind = "chn-"
)

// ErrMalformed is the error that Parse wraps for text that is not an id of the kind.
var ErrMalformed = errors.New("malformed id")

// ErrNone is the error that Parse wraps for text of the right form whose number is larger
// than any UUID. It wraps [ErrMalformed].
var ErrNone = fmt.Errorf("%w: number out of range", ErrMalformed)

// digits is the number of base 36 digits of any 128-bit number.
const digits = 25

// Format returns the text of u, for example "cl-0123456789abcdefghijklmno".
func Format(k Kind, u uuid.UUID) string {
	hi, lo := binary.BigEndian.Uint64(u[:8]), binary.BigEndian.Uint64(u[8:])
	b := make([]byte, len(k)+digits)
	copy(b, k)
	for i := len(b) - 1; i >= len(k); i-- {
		var rest uint64
		hi, rest = hi/36, hi%36
		lo, rest = bits.Div64(rest, lo, 36)
		b[i] = "0123456789abcdefghijklmnopqrstuvwxyz"[rest]
	}
	return string(b)
}

// Parse parses the text of an id of kind k. It accepts only what Format returns.
func Parse(k Kind, s string) (uuid.UUID, error) {
	rest, ok := strings.CutPrefix(s, string(k))
	if !ok || len(rest) != digits {
		return uuid.Nil, fmt.Errorf("%w: want %q and %d digits", ErrMalformed, string(k), digits)
	}
	var hi, lo uint64
	for _, c := range []byte(rest) {
		var digit uint64
		switch {
		case '0' <= c && c <= '9':
			digit = uint64(c - '0')
		case 'a' <= c && c <= 'z':
			digit = uint64(c-'a') + 10
		default:
			return uuid.Nil, fmt.Errorf("%w: want digits 0-9 and a-z after %q", ErrMalformed, string(k))
		}
		// (hi, lo) = 36 × (hi, lo) + digit, unless that takes more than 128 bits.
		over, high := bits.Mul64(hi, 36)
		carry, low := bits.Mul64(lo, 36)
		low, carryLow := bits.Add64(low, digit, 0)
		high, carryHigh := bits.Add64(high, carry, carryLow)
		if over != 0 || carryHigh != 0 {
			return uuid.Nil, ErrNone
		}
		hi, lo = high, low
	}
	var u uuid.UUID
	binary.BigEndian.PutUint64(u[:8], hi)
	binary.BigEndian.PutUint64(u[8:], lo)
	return u, nil
}

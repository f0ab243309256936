// Package id converts between UUIDs, which everything inside Wrenn passes,
// and the prefixed text that every wire carries: a kind's prefix and the
// UUID as 25 digits of lowercase base 36.
package id

import (
	"errors"
	"fmt"
	"math/big"
	"strings"

	"github.com/google/uuid"
)

// Kind is what an id names; its value is the prefix on the wire.
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

// ErrMalformed is what Parse returns, wrapped, for text that is no id of the kind.
var ErrMalformed = errors.New("malformed id")

// digits is the number of base 36 digits that hold any 128-bit number.
const digits = 25

// Format returns u in its wire form, for example
// "cl-0123456789abcdefghijklmno".
func Format(k Kind, u uuid.UUID) string {
	n := new(big.Int).SetBytes(u[:])
	text := n.Text(36)
	return string(k) + strings.Repeat("0", digits-len(text)) + text
}

// Parse reads the wire form of an id of kind k. It accepts the one form that
// Format writes and nothing else.
func Parse(k Kind, s string) (uuid.UUID, error) {
	rest, ok := strings.CutPrefix(s, string(k))
	if !ok || len(rest) != digits {
		return uuid.Nil, fmt.Errorf("%w: want %q and %d digits", ErrMalformed, string(k), digits)
	}
	for _, c := range []byte(rest) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return uuid.Nil, fmt.Errorf("%w: want digits 0-9 and a-z after %q", ErrMalformed, string(k))
		}
	}
	n, ok := new(big.Int).SetString(rest, 36)
	if !ok || n.BitLen() > 128 {
		return uuid.Nil, fmt.Errorf("%w: number out of range", ErrMalformed)
	}
	var u uuid.UUID
	n.FillBytes(u[:])
	return u, nil
}

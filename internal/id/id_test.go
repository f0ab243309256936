package id

import (
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/google/uuid"
)

func TestRoundTrip(t *testing.T) {
	for _, u := range []uuid.UUID{uuid.Nil, uuid.Max, uuid.New(), uuid.MustParse("00000000-0000-0000-0000-000000000001")} {
		s := Format(Sandbox, u)
		if len(s) != len("cl-")+25 {
			t.Errorf("Format(%v) = %q: want 25 digits", u, s)
		}
		got, err := Parse(Sandbox, s)
		if err != nil || got != u {
			t.Errorf("Parse(%q) = %v, %v; want %v", s, got, err, u)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := Format(Sandbox, uuid.New())
	for _, s := range []string{
		"", "cl-", good[3:], "tm-" + good[3:], strings.ToUpper(good), good + "0", good[:len(good)-1],
		"cl-" + strings.Repeat("z", 25), "cl-" + "+" + strings.Repeat("0", 24), "cl-../../../../../../../../x", "cl-\x00" + strings.Repeat("0", 24),
	} {
		if u, err := Parse(Sandbox, s); !errors.Is(err, ErrMalformed) {
			t.Errorf("Parse(%q) = %v, %v; want ErrMalformed", s, u, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Format(Sandbox, uuid.Max))
	f.Add("cl-")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := Parse(Sandbox, s)
		if err == nil && Format(Sandbox, u) != s {
			t.Errorf("Parse(%q) = %v, which formats as %q", s, u, Format(Sandbox, u))
		}
	})
}

// TestMatchesBig compares the wire form with math/big's.
func TestMatchesBig(t *testing.T) {
	check := func(u uuid.UUID) {
		text := new(big.Int).SetBytes(u[:]).Text(36)
		want := string(Sandbox) + strings.Repeat("0", digits-len(text)) + text
		if got := Format(Sandbox, u); got != want {
			t.Errorf("%x: got %s, want %s", u[:], got, want)
		}
		if back, err := Parse(Sandbox, want); err != nil || back != u {
			t.Errorf("%s: got %x, %v", want, back[:], err)
		}
	}
	for range 1000 {
		u := uuid.New()
		check(u)
		for i := range u { // numbers of every length, and the neighbours of powers of 256
			u[i] = 0
			check(u)
			var v uuid.UUID
			for j := i; j < len(v); j++ {
				v[j] = 0xff
			}
			check(v)
		}
	}
	// The smallest number that does not fit in 128 bits.
	over := new(big.Int).Lsh(big.NewInt(1), 128)
	if _, err := Parse(Sandbox, string(Sandbox)+over.Text(36)); !errors.Is(err, ErrMalformed) {
		t.Errorf("2^128: %v", err)
	}
	if allocated := testing.AllocsPerRun(100, func() { _, _ = Parse(Sandbox, "cl-0123456789abcdefghijklmno") }); allocated > 0 {
		t.Errorf("Parse allocates %v times", allocated)
	}
}

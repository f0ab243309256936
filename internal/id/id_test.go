package id

import (
	"errors"
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

package text

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for _, tt := range []struct {
		in   string
		most int
		want string
	}{
		{"plain", 10, "plain"},
		{"plain", 3, "pla"},
		{"aé", 2, "a"},
		{"aé", 3, "aé"},
		{"🐦", 3, ""},
		{"a\x00b", 10, "a\uFFFDb"},
		{"a\xffb", 10, "a\uFFFDb"},
		{"a\xff", 2, "a"},
		{"", 0, ""},
	} {
		if got := Clean(tt.in, tt.most); got != tt.want {
			t.Errorf("Clean(%q, %d) = %q, want %q", tt.in, tt.most, got, tt.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("aé🐦\x00\xff", 5)
	f.Fuzz(func(t *testing.T, s string, most int) {
		if most < 0 {
			return
		}
		got := Clean(s, most)
		if !Valid(got) || len(got) > most {
			t.Errorf("Clean(%q, %d) = %q", s, most, got)
		}
		// Less than one character may be missing.
		if Valid(s) && (!strings.HasPrefix(s, got) || len(s) > most && most-len(got) >= utf8.UTFMax) {
			t.Errorf("Clean(%q, %d) = %q", s, most, got)
		}
	})
}

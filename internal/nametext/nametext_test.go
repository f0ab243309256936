package nametext

import (
	"testing"
	"unicode/utf8"
)

func FuzzText(f *testing.F) {
	for _, s := range []string{"", "plain", "h\u00e9llo", "bad\xffname", "\xfe", "\xc3", "\xed\xa0\x80", "\U0010FE80", "a\U0010FEFF\x80b", "\uFFFD"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		text := Text(name)
		if !utf8.ValidString(text) {
			t.Errorf("%q has the text %q", name, text)
		}
		if back := Name(text); back != name {
			t.Errorf("%q comes back as %q", name, back)
		}
	})
}

func TestText(t *testing.T) {
	for name, want := range map[string]string{"plain": "plain", "h\u00e9llo": "h\u00e9llo", "bad\xffname": "bad\U0010FEFFname", "\uFFFD": "\uFFFD"} {
		if got := Text(name); got != want {
			t.Errorf("%q has the text %q, not %q", name, got, want)
		}
	}
}

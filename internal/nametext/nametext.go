// Package nametext writes names of files, which are bytes, as UTF-8 text that JSON
// and protobuf can carry, and reads them back. Names that are UTF-8 stay as they are.
package nametext

import (
	"strings"
	"unicode/utf8"
)

// A name may have bytes that are not UTF-8, all of them from 0x80 to 0xFF. Text has a rune
// from first to last in place of each: private-use characters, which Unicode assigns to
// nothing.
const (
	first = 0x10FE80
	last  = 0x10FEFF
)

// Text returns a name as text, from which [Name] returns the same name.
func Text(name string) string {
	if utf8.ValidString(name) && !strings.ContainsFunc(name, isEscape) {
		return name
	}
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		if r == utf8.RuneError && n == 1 || isEscape(r) {
			for _, c := range []byte(name[:n]) {
				b.WriteRune(first - 0x80 + rune(c))
			}
		} else {
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return b.String()
}

// Name returns the name that text stands for. It keeps bytes that are not UTF-8.
func Name(text string) string {
	if !strings.ContainsFunc(text, isEscape) {
		return text
	}
	var b strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		if isEscape(r) {
			b.WriteByte(byte(r - first + 0x80))
		} else {
			b.WriteString(text[:n])
		}
		text = text[n:]
	}
	return b.String()
}

// isEscape reports whether r stands for a byte.
func isEscape(r rune) bool { return r >= first && r <= last }

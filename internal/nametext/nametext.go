// Package nametext encodes names of files, which are bytes, as UTF-8 text for JSON and
// protobuf, and decodes them. Names that are UTF-8 stay unchanged.
package nametext

import (
	"strings"
	"unicode/utf8"
)

// Bytes that are not UTF-8 are from 0x80 to 0xFF. Text has a private-use character, from
// first to last, for each of them.
const (
	first = 0x10FE80
	last  = 0x10FEFF
)

// Text encodes a name. [Name] decodes it.
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

// Name decodes text. It keeps bytes of text that are not UTF-8.
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

// Package text defines which strings are valid text in Wrenn, and makes untrusted strings
// valid.
package text

import (
	"strings"
	"unicode/utf8"
)

// Valid reports whether s is UTF-8 without NUL, which PostgreSQL and system calls require.
func Valid(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\x00") }

// Clean returns s as valid text of at most most bytes. It truncates s between characters,
// and replaces invalid bytes with U+FFFD.
func Clean(s string, most int) string {
	if !Valid(s) {
		s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	}
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}

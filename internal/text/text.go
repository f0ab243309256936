// Package text says which strings count as text in Wrenn, and makes text of
// what others wrote.
package text

import (
	"strings"
	"unicode/utf8"
)

// Valid says whether s is UTF-8 without NUL: what PostgreSQL stores and system
// calls take.
func Valid(s string) bool { return utf8.ValidString(s) && !strings.Contains(s, "\x00") }

// Clean returns s as valid text of at most most bytes. It cuts s between
// characters, and puts U+FFFD in the place of what is no text.
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

// Package upload names the temporary files of uploads, which are renamed into place, so
// that watchers can distinguish them from users' files.
package upload

import (
	"crypto/rand"
	"strings"
)

// Kind says whether an upload creates or replaces a file.
type Kind string

const (
	// Fresh is an upload that creates a file.
	Fresh Kind = "new"
	// Over is an upload that replaces a file.
	Over Kind = "old"
)

const prefix = ".wrenn-upload-"

// Name returns a new name for a temporary file.
func Name(k Kind) string { return prefix + string(k) + "-" + rand.Text() }

// KindOf reports whether a base name is that of a temporary file, and its kind.
func KindOf(name string) (Kind, bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return "", false
	}
	for _, k := range []Kind{Fresh, Over} {
		if strings.HasPrefix(rest, string(k)+"-") {
			return k, true
		}
	}
	return "", false
}

// Package upload names the temporary files that uploads are written to before
// they are renamed into place, so that watchers can tell them from users' own.
package upload

import (
	"crypto/rand"
	"strings"
)

// Kind is what an upload's rename does.
type Kind string

const (
	// Fresh makes a file that was not there.
	Fresh Kind = "new"
	// Over replaces a file.
	Over Kind = "old"
)

const prefix = ".wrenn-upload-"

// Name makes the name of a temporary file.
func Name(k Kind) string { return prefix + string(k) + "-" + rand.Text() }

// KindOf tells of a base name whether it is a temporary file's, and of which kind.
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

// Package filesign makes the signatures of URLs that read or write one file of a
// sandbox, as E2B's clients make them.
package filesign

import (
	"crypto/sha256"
	"encoding/base64"
)

// Of returns the signature of a request for a file, made with a sandbox's access
// token. operation is "read" or "write", user the query's username, expiration in
// seconds since 1970; empty: none.
func Of(path, operation, user, token, expiration string) string {
	s := path + ":" + operation + ":" + user + ":" + token
	if expiration != "" {
		s += ":" + expiration
	}
	sum := sha256.Sum256([]byte(s))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Package filesign makes and checks the signatures of URLs that read or write one file
// of a sandbox. They are the same as those of E2B's clients.
package filesign

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Path is the path of signed URLs.
const Path = "/files"

// The query parameters that a signature covers, and the signature.
const (
	pathParam       = "path"
	userParam       = "username"
	expirationParam = "signature_expiration"
	signatureParam  = "signature"
)

// Signed reports whether a request has a signature instead of a token.
func Signed(u *url.URL) bool { return u.Path == Path && u.Query().Has(signatureParam) }

// Of returns the signature of a request for a file, made with the sandbox's access
// token. operation is "read" or "write", user is the query's username, and expiration is
// in seconds since 1970 (empty: never).
func Of(path, operation, user, token, expiration string) string {
	s := path + ":" + operation + ":" + user + ":" + token
	if expiration != "" {
		s += ":" + expiration
	}
	sum := sha256.Sum256([]byte(s))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Check returns nil if q has a signature, made with token, for a request with the given
// method. Otherwise the error says what is wrong.
func Check(method string, q url.Values, token string, now time.Time) error {
	// If a name had two values, the checked one and the used one could differ.
	for _, name := range []string{pathParam, userParam, signatureParam, expirationParam} {
		if len(q[name]) > 1 {
			return fmt.Errorf("query parameter %s has several values", name)
		}
	}
	// A colon separates the signed parts, so it would make them ambiguous.
	if strings.Contains(q.Get(userParam), ":") {
		return errors.New("query parameter " + userParam + " has a colon")
	}
	expiration := q.Get(expirationParam)
	if q.Has(expirationParam) {
		at, err := strconv.ParseInt(expiration, 10, 64)
		if err != nil || strconv.FormatInt(at, 10) != expiration {
			return errors.New("the signature's expiration is not a number of seconds")
		}
		if now.Unix() > at {
			return errors.New("the signature has expired")
		}
	}
	if subtle.ConstantTimeCompare([]byte(q.Get(signatureParam)), []byte(of(method, q, token))) != 1 {
		return errors.New("the signature is wrong, or was made with a token that was revoked")
	}
	return nil
}

// Resign replaces q's signature with one made with token.
func Resign(method string, q url.Values, token string) { q.Set(signatureParam, of(method, q, token)) }

// of returns the signature that a request must have.
func of(method string, q url.Values, token string) string {
	operation := "write"
	if method == http.MethodGet || method == http.MethodHead {
		operation = "read"
	}
	return Of(q.Get(pathParam), operation, q.Get(userParam), token, q.Get(expirationParam))
}

// Package filesign makes the signatures of URLs that read or write one file of a
// sandbox, as E2B's clients make them.
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

// Signed reports whether a request shows a signature instead of a token.
func Signed(u *url.URL) bool { return u.Path == Path && u.Query().Has(signatureParam) }

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

// Check returns an error that says why q's signature does not allow a request
// with the method, or nil. The signature must be made with token.
func Check(method string, q url.Values, token string, now time.Time) error {
	// If a name had two values, the checked one and the used one could differ.
	for _, name := range []string{pathParam, userParam, signatureParam, expirationParam} {
		if len(q[name]) > 1 {
			return fmt.Errorf("query parameter %s is there twice", name)
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

// Resign replaces q's signature with the one that token makes.
func Resign(method string, q url.Values, token string) { q.Set(signatureParam, of(method, q, token)) }

// of returns the signature that a request must show.
func of(method string, q url.Values, token string) string {
	operation := "write"
	if method == http.MethodGet || method == http.MethodHead {
		operation = "read"
	}
	return Of(q.Get(pathParam), operation, q.Get(userParam), token, q.Get(expirationParam))
}

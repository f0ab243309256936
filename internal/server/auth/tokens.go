// Package auth says who calls: API keys, passwords, and the tokens of
// sandboxes.
package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"

	"github.com/google/uuid"
)

// Tokens makes the tokens of sandboxes from the server's secret; none is stored.
type Tokens struct{ secret []byte }

// NewTokens returns the tokens of a secret, which must be long and random.
func NewTokens(secret []byte) Tokens { return Tokens{secret} }

// Access is what the guest daemon asks for in X-Access-Token.
func (t Tokens) Access(sandbox uuid.UUID) string { return t.mac("access:", sandbox) }

// Traffic is what opens a sandbox's ports in X-Traffic-Token.
func (t Tokens) Traffic(sandbox uuid.UUID) string { return t.mac("traffic:", sandbox) }

func (t Tokens) mac(purpose string, sandbox uuid.UUID) string {
	m := hmac.New(sha256.New, t.secret)
	m.Write([]byte(purpose))
	m.Write([]byte(sandbox.String()))
	return hex.EncodeToString(m.Sum(nil))
}

// Equal compares two secrets in a time that tells nothing but their lengths.
func Equal(got, want string) bool {
	return subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}

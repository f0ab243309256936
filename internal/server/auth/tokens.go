// Package auth says who calls: API keys, passwords, and the tokens of
// sandboxes.
package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"

	"github.com/google/uuid"
)

// Tokens makes the tokens of sandboxes and hosts from the server's secret; none is stored.
type Tokens struct{ secret []byte }

// NewTokens returns the tokens of a secret, which must be long and random.
func NewTokens(secret []byte) Tokens { return Tokens{secret} }

// Access is what the guest daemon asks for in X-Access-Token.
func (t Tokens) Access(sandbox uuid.UUID) string { return t.mac("access:", sandbox) }

// Traffic is what opens a sandbox's ports in X-Traffic-Token.
func (t Tokens) Traffic(sandbox uuid.UUID) string { return t.mac("traffic:", sandbox) }

// Agent is what a host's agent asks of the control plane, from one
// registration of the host to the next, which epoch counts.
func (t Tokens) Agent(host uuid.UUID, epoch int32) string {
	return t.mac(fmt.Sprintf("agent:%d:", epoch), host)
}

// HostKey is the key that hosts' own tokens are signed with.
func (t Tokens) HostKey() []byte {
	m := hmac.New(sha256.New, t.secret)
	m.Write([]byte("hosts"))
	return m.Sum(nil)
}

func (t Tokens) mac(purpose string, of uuid.UUID) string {
	m := hmac.New(sha256.New, t.secret)
	m.Write([]byte(purpose))
	m.Write([]byte(of.String()))
	return hex.EncodeToString(m.Sum(nil))
}

// Equal compares two secrets in a time that tells nothing but their lengths.
func Equal(got, want string) bool {
	return subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}

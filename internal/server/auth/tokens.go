// Package auth authenticates callers by API keys, sessions, passwords and the tokens of
// sandboxes, and checks what they may do.
package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// Tokens derives the tokens of sandboxes and hosts from the installation's secret. It
// stores none.
type Tokens struct{ secret []byte }

// NewTokens returns the tokens derived from a secret, which must be long and random.
func NewTokens(secret []byte) Tokens { return Tokens{secret} }

// Guest returns the token that envd requires in X-Access-Token for the lifetime of the
// sandbox.
func (t Tokens) Guest(sandbox uuid.UUID) string { return t.mac("access:", sandbox) }

// Access returns the token with which a client reaches envd. epoch counts the revocations
// of the sandbox's tokens. The token of epoch 0 is envd's own.
func (t Tokens) Access(sandbox uuid.UUID, epoch int32) string {
	return t.ofEpoch("access:", sandbox, epoch)
}

// Traffic returns the token that opens a sandbox's ports in X-Traffic-Token. epoch counts
// the revocations of the sandbox's tokens.
func (t Tokens) Traffic(sandbox uuid.UUID, epoch int32) string {
	return t.ofEpoch("traffic:", sandbox, epoch)
}

// AccessEpoch returns the epoch of a sandbox's access token. A later epoch may have
// revoked it.
func (t Tokens) AccessEpoch(sandbox uuid.UUID, token string) (epoch int32, ok bool) {
	return epochOf(token, func(epoch int32) string { return t.Access(sandbox, epoch) })
}

// TrafficEpoch returns the epoch of a sandbox's traffic token. A later epoch may have
// revoked it.
func (t Tokens) TrafficEpoch(sandbox uuid.UUID, token string) (epoch int32, ok bool) {
	return epochOf(token, func(epoch int32) string { return t.Traffic(sandbox, epoch) })
}

// ofEpoch returns the token of an epoch. Tokens of all epochs but 0 begin with the
// number.
func (t Tokens) ofEpoch(purpose string, sandbox uuid.UUID, epoch int32) string {
	if epoch == 0 {
		return t.mac(purpose, sandbox)
	}
	return fmt.Sprintf("%d.%s", epoch, t.mac(fmt.Sprintf("%s%d:", purpose, epoch), sandbox))
}

// epochOf returns the epoch in a token, if made returns the same token for it.
func epochOf(token string, made func(epoch int32) string) (int32, bool) {
	var epoch int64
	if number, _, ok := strings.Cut(token, "."); ok {
		var err error
		if epoch, err = strconv.ParseInt(number, 10, 32); err != nil || epoch < 1 {
			return 0, false
		}
	}
	return int32(epoch), Equal(token, made(int32(epoch)))
}

// Agent returns the token that a host's agent requires of the control plane. epoch counts
// the registrations of the host.
func (t Tokens) Agent(host uuid.UUID, epoch int32) string {
	return t.mac(fmt.Sprintf("agent:%d:", epoch), host)
}

// HostKey returns the key that signs hosts' tokens.
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

// Equal compares two secrets in constant time. Only their lengths affect the time.
func Equal(got, want string) bool {
	return subtle.ConstantTimeCompare([]byte(got), []byte(want)) == 1
}

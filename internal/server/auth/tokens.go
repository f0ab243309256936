// Package auth says who calls: API keys, passwords, and the tokens of
// sandboxes.
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

// Tokens makes the tokens of sandboxes and hosts from the server's secret; none is stored.
type Tokens struct{ secret []byte }

// NewTokens returns the tokens of a secret, which must be long and random.
func NewTokens(secret []byte) Tokens { return Tokens{secret} }

// Guest is what the guest daemon asks for in X-Access-Token, for as long as the
// sandbox lives.
func (t Tokens) Guest(sandbox uuid.UUID) string { return t.mac("access:", sandbox) }

// Access is what a client shows to reach the guest daemon, until the sandbox's
// tokens are revoked, which epoch counts. Of epoch 0 it is the guest's own.
func (t Tokens) Access(sandbox uuid.UUID, epoch int32) string {
	return t.ofEpoch("access:", sandbox, epoch)
}

// Traffic is what opens a sandbox's ports in X-Traffic-Token, until the
// sandbox's tokens are revoked, which epoch counts.
func (t Tokens) Traffic(sandbox uuid.UUID, epoch int32) string {
	return t.ofEpoch("traffic:", sandbox, epoch)
}

// AccessEpoch returns of which epoch an access token of a sandbox is. It may
// have been revoked.
func (t Tokens) AccessEpoch(sandbox uuid.UUID, token string) (epoch int32, ok bool) {
	return epochOf(token, func(epoch int32) string { return t.Access(sandbox, epoch) })
}

// TrafficEpoch returns of which epoch a traffic token of a sandbox is. It may
// have been revoked.
func (t Tokens) TrafficEpoch(sandbox uuid.UUID, token string) (epoch int32, ok bool) {
	return epochOf(token, func(epoch int32) string { return t.Traffic(sandbox, epoch) })
}

// ofEpoch is a token that begins with its epoch, but for the first.
func (t Tokens) ofEpoch(purpose string, sandbox uuid.UUID, epoch int32) string {
	if epoch == 0 {
		return t.mac(purpose, sandbox)
	}
	return fmt.Sprintf("%d.%s", epoch, t.mac(fmt.Sprintf("%s%d:", purpose, epoch), sandbox))
}

// epochOf returns the epoch that a token says, if made makes the same of it.
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

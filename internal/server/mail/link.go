package mail

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// NewToken returns a random token for a link in a mail, and its [HashToken].
func NewToken(prefix string) (token string, hash []byte) {
	var random [32]byte
	rand.Read(random[:])
	token = prefix + base64.RawURLEncoding.EncodeToString(random[:])
	return token, HashToken(token)
}

// HashToken returns the hash of a token. The database stores only the hash, so nobody who
// reads it can open the link.
func HashToken(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// Link returns the URL of a page such as "/verify" with a token in the fragment, which
// browsers do not send to servers.
func Link(publicURL, page, token string) string {
	return strings.TrimSuffix(publicURL, "/") + page + "#token=" + token
}

package mail

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"strings"
)

// NewToken returns a random token for the link in a letter, and the token's
// [HashToken].
func NewToken(prefix string) (token string, hash []byte) {
	var random [32]byte
	rand.Read(random[:])
	token = prefix + base64.RawURLEncoding.EncodeToString(random[:])
	return token, HashToken(token)
}

// HashToken returns the hash by which the database knows a token, so that nobody who
// reads the database can open the link.
func HashToken(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// Link returns the URL of one of the service's pages, such as "/verify", with a token
// in its fragment, which browsers send to no server.
func Link(publicURL, page, token string) string {
	return strings.TrimSuffix(publicURL, "/") + page + "#token=" + token
}

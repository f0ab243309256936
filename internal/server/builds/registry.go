package builds

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Registry is the credentials for an image registry.
type Registry struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// aead returns the cipher for registry credentials, with a key for nothing else.
func (s *Service) aead() (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, s.Secret, nil, "wrenn build registries", chacha20poly1305.KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive key for registry credentials: %w", err)
	}
	return chacha20poly1305.NewX(key)
}

// sealRegistry encrypts a build's registry credentials: a random nonce of 24 bytes, then
// XChaCha20-Poly1305 of the JSON, bound to the build's id.
func (s *Service) sealRegistry(build uuid.UUID, r Registry) ([]byte, error) {
	if r.Username == "" {
		return nil, fault.New(fault.InvalidArgument, "registry: a password needs a username")
	}
	plain, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	aead, err := s.aead()
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("encrypt registry credentials: %w", err)
	}
	return aead.Seal(nonce, nonce, plain, build[:]), nil
}

// openRegistry decrypts a build's registry credentials; zero if it has none.
func (s *Service) openRegistry(b db.Build) (r Registry, err error) {
	if len(b.Registry) == 0 {
		return r, nil
	}
	aead, err := s.aead()
	if err != nil {
		return r, err
	}
	n := aead.NonceSize()
	if len(b.Registry) < n {
		return r, errors.New("the registry credentials are malformed")
	}
	plain, err := aead.Open(nil, b.Registry[:n], b.Registry[n:], b.ID[:])
	if err != nil {
		return r, fault.New(fault.Conflict, "cannot decrypt the registry credentials: they were encrypted with another WRENN_SECRET_KEY")
	}
	return r, json.Unmarshal(plain, &r)
}

package auth

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// minRingKey is how many bytes a key must have.
const minRingKey = 32

// Ring is the keys of WRENN_SECRET_KEY, the current one first. The installation's
// secret is kept in the database under one of them.
type Ring struct{ keys []ringKey }

type ringKey struct {
	id    string
	bytes []byte
}

// ParseRing reads keys in hexadecimal, separated by commas.
func ParseRing(text string) (Ring, error) {
	var r Ring
	for _, part := range strings.Split(text, ",") {
		b, err := hex.DecodeString(strings.TrimSpace(part))
		if err != nil || len(b) < minRingKey {
			return Ring{}, fmt.Errorf("read WRENN_SECRET_KEY: want at least %d bytes in hexadecimal, or several such keys with commas between them", minRingKey)
		}
		sum := sha256.Sum256(b)
		r.keys = append(r.keys, ringKey{hex.EncodeToString(sum[:8]), b})
	}
	return r, nil
}

// Secret returns the installation's secret. An installation that has none yet gets
// one; one of an earlier release keeps its oldest key as its secret. If another
// key than the current one was used to keep it, it is encrypted anew.
func (r Ring) Secret(ctx context.Context, s *store.Store) (secret []byte, err error) {
	err = s.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockBootstrap(ctx); err != nil {
			return err
		}
		row, err := q.GetInstallationSecret(ctx)
		switch {
		case errors.Is(err, store.ErrNoRows):
			if secret, err = r.first(ctx, q); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			if secret, err = r.open(row); err != nil || row.KeyID == r.keys[0].id {
				return err
			}
		}
		return r.keep(ctx, q, secret)
	})
	if err != nil {
		return nil, fmt.Errorf("read the installation's secret: %w", err)
	}
	return secret, nil
}

// first returns the secret of an installation that has kept none yet.
func (r Ring) first(ctx context.Context, q *db.Queries) ([]byte, error) {
	n, err := q.CountUsers(ctx)
	if err != nil {
		return nil, err
	}
	if n > 0 { // of an earlier release
		return r.keys[len(r.keys)-1].bytes, nil
	}
	secret := make([]byte, minRingKey)
	_, _ = rand.Read(secret) // never fails
	return secret, nil
}

func (r Ring) keep(ctx context.Context, q *db.Queries, secret []byte) error {
	k := r.keys[0]
	aead, err := k.aead()
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	return q.SetInstallationSecret(ctx, db.SetInstallationSecretParams{KeyID: k.id, Sealed: aead.Seal(nonce, nonce, secret, []byte(k.id))})
}

func (r Ring) open(row db.InstallationSecret) ([]byte, error) {
	for _, k := range r.keys {
		if k.id != row.KeyID {
			continue
		}
		aead, err := k.aead()
		if err != nil {
			return nil, err
		}
		if n := aead.NonceSize(); len(row.Sealed) > n {
			if secret, err := aead.Open(nil, row.Sealed[:n], row.Sealed[n:], []byte(k.id)); err == nil {
				return secret, nil
			}
		}
		return nil, fmt.Errorf("what key %s has encrypted is damaged", k.id)
	}
	return nil, fmt.Errorf("WRENN_SECRET_KEY lacks the key with the id %s, under which the database keeps the secret", row.KeyID)
}

func (k ringKey) aead() (cipher.AEAD, error) {
	return chacha20poly1305.NewX(Derive(k.bytes, "installation secret"))
}

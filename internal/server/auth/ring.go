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

// minRingKey is the minimum length of a key, in bytes.
const minRingKey = 32

// Ring is the keys in WRENN_SECRET_KEY, the current one first. The database stores the
// installation's secret encrypted with one of them.
type Ring struct{ keys []ringKey }

type ringKey struct {
	id    string
	bytes []byte
}

// ParseRing parses hexadecimal keys that are separated by commas.
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

// Secret returns the installation's secret. It creates one for a new installation. An
// installation of a release that stored none keeps its oldest key as the secret. If an
// old key encrypts the stored secret, Secret encrypts it again with the current one.
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

// first returns the secret of an installation that has stored none yet.
func (r Ring) first(ctx context.Context, q *db.Queries) ([]byte, error) {
	n, err := q.CountUsers(ctx)
	if err != nil {
		return nil, err
	}
	if n > 0 { // An earlier release used its key as the secret.
		return r.keys[len(r.keys)-1].bytes, nil
	}
	secret := make([]byte, minRingKey)
	_, _ = rand.Read(secret) // It never fails.
	return secret, nil
}

func (r Ring) keep(ctx context.Context, q *db.Queries, secret []byte) error {
	k := r.keys[0]
	aead, err := k.aead()
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce) // It never fails.
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
		return nil, fmt.Errorf("the secret that key %s encrypted is damaged", k.id)
	}
	return nil, fmt.Errorf("WRENN_SECRET_KEY lacks the key with the id %s, which encrypts the secret in the database", row.KeyID)
}

func (k ringKey) aead() (cipher.AEAD, error) {
	return chacha20poly1305.NewX(Derive(k.bytes, "installation secret"))
}

package up

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// adminEmail is the first admin's login.
const adminEmail = "admin@localhost"

// secrets are the random secrets that an installation generates once.
type secrets struct {
	SecretKey     string `json:"secret_key"`  // sandboxes' tokens are made from it
	AgentToken    string `json:"agent_token"` // between server and agent
	AdminPassword string `json:"admin_password"`
	AdminAPIKey   string `json:"admin_api_key"`
}

// credentials is the file that client commands read.
type credentials struct {
	URL      string `json:"url"`
	APIKey   string `json:"api_key"`
	Email    string `json:"email"`
	Password string `json:"password"`
}

// loadSecrets reads the installation's secrets. It generates them only if there is no
// database yet, because new ones could not open an existing database.
func loadSecrets(dir layout.Dir) (secrets, error) {
	path := dir.Secrets()
	b, err := os.ReadFile(path)
	if err == nil {
		var s secrets
		if err := json.Unmarshal(b, &s); err != nil {
			return secrets{}, fmt.Errorf("read secrets: %s is damaged, restore it from a backup: %w", path, err)
		}
		if s.SecretKey == "" || s.AgentToken == "" || s.AdminPassword == "" || s.AdminAPIKey == "" {
			return secrets{}, fmt.Errorf("read secrets: %s lacks one of its members, restore it from a backup", path)
		}
		return s, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return secrets{}, fmt.Errorf("read secrets: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir.Postgres(), postgresData)); !errors.Is(err, fs.ErrNotExist) {
		return secrets{}, errors.Join(fmt.Errorf("read secrets: %s is missing, and the database in %s needs it: restore it from a backup", path, dir.Postgres()), err)
	}
	s := secrets{SecretKey: random(32), AgentToken: random(32), AdminPassword: rand.Text(), AdminAPIKey: "wrn_" + random(20)}
	if err := atomicfile.WriteJSON(path, s); err != nil {
		return secrets{}, fmt.Errorf("write secrets: %w", err)
	}
	return s, nil
}

// random returns n random bytes in hexadecimal.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

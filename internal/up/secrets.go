package up

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// adminEmail is the first admin's login.
const adminEmail = "admin@localhost"

// secrets are what an installation makes up once.
type secrets struct {
	SecretKey     string `json:"secret_key"`  // sandboxes' tokens are made from it
	AgentToken    string `json:"agent_token"` // between server and agent
	AdminPassword string `json:"admin_password"`
	AdminAPIKey   string `json:"admin_api_key"`
}

// credentials are what client commands read.
type credentials struct {
	URL      string `json:"url"`
	APIKey   string `json:"api_key"`
	Email    string `json:"email"`
	Password string `json:"password"`
}

// loadSecrets reads the installation's secrets, or makes them.
func loadSecrets(dir layout.Dir) (secrets, error) {
	path := dir.Secrets()
	b, err := os.ReadFile(path)
	if err == nil {
		var s secrets
		if err := json.Unmarshal(b, &s); err != nil {
			return secrets{}, fmt.Errorf("read secrets: %w", err)
		}
		return s, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return secrets{}, fmt.Errorf("read secrets: %w", err)
	}
	s := secrets{SecretKey: random(32), AgentToken: random(32), AdminPassword: rand.Text(), AdminAPIKey: "wrn_" + random(20)}
	if err := atomicfile.WriteJSON(path, s); err != nil {
		return secrets{}, fmt.Errorf("write secrets: %w", err)
	}
	return s, nil
}

// random is n random bytes in hexadecimal.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

package server_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// TestBackup starts a server on a database restored as docs/backup.md describes. The
// server knows every entity and key of the copy, and ends the sandboxes that the host has
// lost since.
func TestBackup(t *testing.T) {
	t.Parallel()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_restore")
	if len(found) == 0 {
		t.Skip("needs pg_restore")
	}
	page, err := os.ReadFile("../../docs/backup.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	follow := func(command, database string) {
		t.Helper()
		var line string
		for l := range strings.Lines(string(page)) {
			if strings.HasPrefix(l, "    "+command+" ") {
				line = strings.TrimSpace(l)
			}
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-c", line)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "DATABASE_URL="+database)
		if out, err := cmd.CombinedOutput(); err != nil || line == "" {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}

	p := newPlane(t)
	lives, ended := p.create(map[string]any{}), p.create(map[string]any{})
	follow("pg_dump", p.config.DatabaseURL)
	p.call("DELETE", "/v1/sandboxes/"+ended, nil).want(204)
	since := p.create(map[string]any{})
	p.end()

	// First restore into an empty database, then in place of one that a later release changed.
	p.sql("CREATE TABLE later (sandbox_id uuid REFERENCES sandboxes)")
	p.sql("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)")
	for _, database := range []string{pgtest.New(t), p.config.DatabaseURL} {
		follow("psql", database)
		follow("pg_restore", database)
		p.config.DatabaseURL = database
		p.start()
		if got := p.call("GET", "/v1/sandboxes/"+lives, nil).want(200).object()["state"]; got != "running" {
			t.Errorf("a sandbox that is in the copy is %v", got)
		}
		p.call("GET", "/v1/sandboxes/"+since, nil).want(404)
		p.eventually("a sandbox that ended after the copy is stopped", func() bool {
			return p.call("GET", "/v1/sandboxes/"+ended, nil).want(200).object()["state"] == "stopped"
		})
		p.end()
	}
	p.start()
}

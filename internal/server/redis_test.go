package server

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
)

// TestCheckRedis checks that the server reports unsuitable Redis settings when it starts.
func TestCheckRedis(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	t.Cleanup(func() { _ = client.Close() })
	for _, c := range []struct{ memory, policy, want string }{
		{"0", "allkeys-lru", "no maxmemory"},
		{"0", "noeviction", "no maxmemory"},
		{"100mb", "noeviction", "refuses writes"},
		{"100mb", "allkeys-lru", ""},
		{"100mb", "volatile-ttl", ""},
	} {
		for name, value := range map[string]string{"maxmemory": c.memory, "maxmemory-policy": c.policy} {
			if err := client.ConfigSet(t.Context(), name, value).Err(); err != nil {
				t.Fatal(err)
			}
		}
		var said bytes.Buffer
		err := checkRedis(t.Context(), client, slog.New(slog.NewTextHandler(&said, nil)))
		if got := said.String(); err != nil || !strings.Contains(got, c.want) || (c.want == "") != (got == "") {
			t.Errorf("%s, %s: said %q, %v", c.memory, c.policy, got, err)
		}
	}
	// A Redis that hides its settings counts as reachable, and one that is down does not.
	if err := client.Do(t.Context(), "ACL", "SETUSER", "default", "-info").Err(); err != nil {
		t.Fatal(err)
	}
	if err := checkRedis(t.Context(), client, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("one that hides its settings: %v", err)
	}
	away := redis.NewClient(&redis.Options{Network: "unix", Addr: socket + "x", MaxRetries: -1})
	t.Cleanup(func() { _ = away.Close() })
	if err := checkRedis(t.Context(), away, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("one that is down counts as reachable")
	}
}

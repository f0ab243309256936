package auth

import (
	"log/slog"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

// TestCheckRecent checks that a key is cached until anybody's access shrinks, and no
// longer than it is valid.
func TestCheckRecent(t *testing.T) {
	url := storetest.New(t)
	st, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	const key = keyPrefix + "0123456789012345678901234567890123456789"
	if _, err := Bootstrap(t.Context(), st, FirstAdmin{Email: "a@example.com", Password: "long enough", APIKey: key, PasswordCost: Cost{Passes: 1, MemoryKiB: 8, Threads: 1}}); err != nil {
		t.Fatal(err)
	}
	k := NewKeys(st, slog.New(slog.DiscardHandler))
	conn := pgtest.Connect(t, url)
	sql := func(statement string, arguments ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), statement, arguments...); err != nil {
			t.Fatal(err)
		}
	}
	expires := time.Now().Add(recentLasts / 2).Truncate(time.Microsecond)
	sql("UPDATE api_keys SET expires_at = $1", expires)
	first, err := k.CheckRecent(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	for hash, found := range k.recent.known {
		if found.until.After(expires) {
			t.Errorf("a key that expires at %v is cached until %v", expires, found.until)
		}
		found.until = time.Now().Add(time.Hour)
		k.recent.known[hash] = found
	}
	sql("DELETE FROM api_keys")
	if again, err := k.CheckRecent(t.Context(), key); err != nil || again.Key != first.Key {
		t.Errorf("the key is not cached: %v", err)
	}
	if _, err := k.CheckRecent(t.Context(), key+"x"); err == nil {
		t.Error("another key passes for the cached one")
	}
	k.Forget()
	if _, err := k.CheckRecent(t.Context(), key); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("a revoked key: %v", err)
	}
	if len(k.recent.known) > 0 {
		t.Error("an invalid key is cached")
	}
}

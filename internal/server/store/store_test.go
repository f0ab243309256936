package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// migrated is copied for tests of the schema, because all migrations together take long.
// Other packages use storetest, which imports this one.
var migrated = pgtest.Template{Fill: func(url string) error {
	s, err := Open(context.Background(), url)
	if err != nil {
		return err
	}
	s.Close()
	return nil
}}

// TestOpenTogether starts several servers on one empty database.
func TestOpenTogether(t *testing.T) {
	url := pgtest.New(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			s, err := Open(context.Background(), url)
			if err != nil {
				t.Errorf("Open: %v", err)
				return
			}
			defer s.Close()
			if err := s.Ping(context.Background()); err != nil {
				t.Errorf("Ping: %v", err)
			}
		})
	}
	wg.Wait()
}

// TestNewerSchema checks that a server stops at once on a schema of a later release and
// says so, even if the unknown migration has a low number.
func TestNewerSchema(t *testing.T) {
	for _, version := range []int64{2, 99999} {
		url := migrated.New(t)
		s, err := Open(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		const count = "SELECT count(*) FROM goose_db_version"
		var before, after int
		_, err = s.pool.Exec(t.Context(), "INSERT INTO goose_db_version (version_id, is_applied) VALUES ($1, true)", version)
		err = errors.Join(err, s.pool.QueryRow(t.Context(), count).Scan(&before))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, err = Open(t.Context(), url)
		var newer *NewerError
		if !errors.As(err, &newer) || newer.Version != version || newer.Known < 15 {
			t.Fatalf("with version %d: %v", version, err)
		}
		for _, says := range []string{fmt.Sprint("version ", version), fmt.Sprint("up to ", newer.Known), "docs/upgrade.md"} {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%q does not say %q", err, says)
			}
		}
		// A server of that release still works.
		if err := errors.Join(s.Ping(t.Context()), s.pool.QueryRow(t.Context(), count).Scan(&after)); err != nil || after != before {
			t.Errorf("%d migrations before, %d after: %v", before, after, err)
		}
		_, err = s.pool.Exec(t.Context(), "DELETE FROM goose_db_version WHERE version_id = $1", version)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Open(t.Context(), url)
		if err != nil {
			t.Fatalf("without it: %v", err)
		}
		again.Close()
	}
}

func TestOpenHidesPassword(t *testing.T) {
	_, err := Open(context.Background(), "postgres://u:hunter2@[bad/db")
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("Open of a malformed URL: %v; want an error without the password", err)
	}
}

func TestUnreachable(t *testing.T) {
	c := pgtest.Shared(t)
	s, err := Open(context.Background(), migrated.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.GetSandbox(context.Background(), uuid.New()); Unreachable(err) {
		t.Errorf("Unreachable(%v) = true", err)
	}
	c.Stop()
	if _, err := s.GetSandbox(context.Background(), uuid.New()); !Unreachable(err) {
		t.Errorf("stopped database: Unreachable(%v) = false", err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// Connections that the stop cut may still be in the pool, which drops them one by
	// one.
	for range 4 {
		_, err = s.CountUsers(context.Background())
		if err == nil {
			break
		}
	}
	if err != nil {
		t.Errorf("after the restart: %v", err)
	}
}

// TestReadOnly fails over while the old primary keeps running read-only: the pool
// replaces its connections with ones to the new primary.
func TestReadOnly(t *testing.T) {
	c := pgtest.Shared(t)
	created, err := url.Parse(migrated.New(t))
	if err != nil {
		t.Fatal(err)
	}
	database := strings.TrimPrefix(created.Path, "/")
	standby := c.Standby(t)
	s, err := Open(t.Context(), c.URL(database, standby))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	change := func() error { return s.ServerAlive(t.Context(), uuid.New()) }
	if err := change(); err != nil {
		t.Fatal(err)
	}
	standby.Do(t, "SELECT pg_promote()")
	c.Do(t, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
	defer c.Do(t, "SET default_transaction_read_only = off", "ALTER SYSTEM SET default_transaction_read_only = off", "SELECT pg_reload_conf()")
	failed := false
	await.Until(t, "the new primary is found", func() bool {
		err := change()
		if err != nil && !Unreachable(err) {
			t.Fatalf("Unreachable(%v) = false", err)
		}
		failed = failed || err != nil
		return failed && err == nil
	})
}

// TestListen breaks the listening connection: the store delivers later notifications, and
// reports that some may be lost.
func TestListen(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := Open(ctx, migrated.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	heard, done := make(chan string), make(chan struct{})
	go func() {
		defer close(done)
		s.Listen(ctx, slog.New(slog.DiscardHandler), "a channel", func(message string) { heard <- message })
	}()
	for range 2 {
		if message := <-heard; message != "" {
			t.Errorf("the first notification is %q", message)
		}
		if _, err := s.pool.Exec(ctx, `SELECT pg_notify('a channel', 'x')`); err != nil {
			t.Fatal(err)
		}
		if message := <-heard; message != "x" {
			t.Errorf("received %q", message)
		}
		if _, err := s.pool.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'`); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	<-done
}

// TestPools checks that both pools end idle transactions, and that heartbeats and leases
// get connections when all others are in use.
func TestPools(t *testing.T) {
	s, pool, _ := quotaTest(t)
	for name, p := range map[string]*pgxpool.Pool{"all": s.pool, "vital": s.kept} {
		var after time.Duration
		var text string
		err := p.QueryRow(t.Context(), "SELECT setting FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'").Scan(&text)
		if err == nil {
			after, err = time.ParseDuration(text + "ms")
		}
		if err != nil || after <= 0 || after > 10*time.Minute {
			t.Errorf("%s: an idle transaction ends after %v, %v", name, after, err)
		}
	}
	for range pool.Config().MaxConns {
		c, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Release()
	}
	if _, err := s.Vital.CountUsers(t.Context()); err != nil {
		t.Error("while all connections are in use: ", err)
	}
}

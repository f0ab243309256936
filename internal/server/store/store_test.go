package store

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

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

func TestOpenHidesPassword(t *testing.T) {
	_, err := Open(context.Background(), "postgres://u:hunter2@[bad/db")
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("Open of a malformed URL: %v; want an error without the password", err)
	}
}

func TestUnreachable(t *testing.T) {
	c := pgtest.Shared(t)
	s, err := Open(context.Background(), pgtest.New(t))
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
	// Connections that the stop cut may still be in the pool; they are dropped one by one.
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

// TestListen breaks the connection that is listened on: what is said after that
// is heard, and that something may have been missed.
func TestListen(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := Open(ctx, pgtest.New(t))
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
			t.Errorf("the first word is %q", message)
		}
		if _, err := s.pool.Exec(ctx, `SELECT pg_notify('a channel', 'x')`); err != nil {
			t.Fatal(err)
		}
		if message := <-heard; message != "x" {
			t.Errorf("heard %q", message)
		}
		if _, err := s.pool.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN %'`); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	<-done
}

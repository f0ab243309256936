package notify

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/mail/mailtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

// TestHangingReceivers has receivers of one team that hang, and a channel of it that
// panics: deliveries to another team and to the team's other channel are not delayed.
func TestHangingReceivers(t *testing.T) {
	b := newBench(t, storetest.New(t))
	other := newBench(t, b.conn.Config().ConnString())
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team'), ($2, 'other')", b.team, other.team)
	let, hanging := make(chan struct{}), make(chan struct{}, 1000)
	hangs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		hanging <- struct{}{}
		select {
		case <-let:
		case <-r.Context().Done():
		}
	}))
	defer hangs.Close()
	defer close(let)
	works, others := newReceiver(t), newReceiver(t)
	for range 3 {
		b.channel(Slack, hangs.URL, "sandbox.started")
	}
	b.channel(Slack, works.URL, "sandbox.ended")
	other.channel(Slack, others.URL, "sandbox.started")
	name, address := "c", "ops@example.com"
	if _, err := b.Create(t.Context(), b.team, true, Params{Kind: Email, Name: &name, Events: []string{"quota.reached"}, Address: &address}); err != nil {
		t.Fatal(err)
	}
	b.exec("UPDATE channels SET confirmed_at = now()")
	b.Mail = nil // its use panics
	// They are older than everything else, and more than a server attempts at once.
	for range 2 * workers {
		b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", b.team)
	}
	b.exec("SELECT notify_channels($1, 'quota.reached', '{}')", b.team)
	b.exec("SELECT notify_channels($1, 'sandbox.ended', '{}')", b.team)
	b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", other.team)
	b.run()
	<-hanging
	b.eventually("the other channels get their deliveries", func() bool { return len(works.received()) == 1 && len(others.received()) == 1 })
	b.eventually("the panic counts as a failed attempt", func() (ok bool) {
		err := b.conn.QueryRow(t.Context(), "SELECT count(*) = 1 FROM deliveries WHERE event = 'quota.reached' AND error = 'internal error' AND state = 'pending'").Scan(&ok)
		return err == nil && ok
	})
	var waits bool
	if err := b.conn.QueryRow(t.Context(), "SELECT bool_and(attempts <= 1 AND error = '') FROM deliveries WHERE event = 'sandbox.started' AND state = 'pending'").Scan(&waits); err != nil || !waits {
		t.Errorf("other channels waited for a receiver's timeout: %v", err)
	}
}

// TestHangingReceiversOfOwner has receivers of several teams of one owner that hang:
// another team's delivery is not delayed.
func TestHangingReceiversOfOwner(t *testing.T) {
	b := newBench(t, storetest.New(t))
	owner := uuid.New()
	b.exec("INSERT INTO users (id, email) VALUES ($1, 'a@example.com')", owner)
	let, hanging := make(chan struct{}), make(chan struct{}, 1000)
	hangs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		hanging <- struct{}{}
		select {
		case <-let:
		case <-r.Context().Done():
		}
	}))
	defer hangs.Close()
	defer close(let)
	for range workers / ofPayer {
		b.team = uuid.New()
		b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
		b.exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", b.team, owner)
		for range ofPayer / ofChannel {
			b.channel(Slack, hangs.URL, "sandbox.started")
		}
		for range ofChannel {
			b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", b.team)
		}
	}
	b.team = uuid.New()
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'other')", b.team)
	works := newReceiver(t)
	b.channel(Slack, works.URL, "sandbox.started")
	b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", b.team)
	b.run()
	<-hanging
	b.eventually("another owner's channel gets its delivery", func() bool { return len(works.received()) == 1 })
	var waits bool
	if err := b.conn.QueryRow(t.Context(), "SELECT bool_and(attempts <= 1 AND error = '') FROM deliveries WHERE state = 'pending'").Scan(&waits); err != nil || !waits {
		t.Errorf("it waited for a receiver's timeout: %v", err)
	}
	if n := len(hanging) + 1; n > ofPayer {
		t.Errorf("%d of an owner's deliveries are attempted at once, want %d", n, ofPayer)
	}
}

// TestMailsHaveRate emits more events than mails may be sent for all teams of one owner:
// the others wait, without using up their attempts.
func TestMailsHaveRate(t *testing.T) {
	b := newBench(t, storetest.New(t))
	post := mailtest.Start(t, mailtest.Options{})
	messages, err := mail.New("smtp://"+post.Addr+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.Mail = messages
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case <-post.Messages:
			case <-over:
				return
			}
		}
	}()
	owner := uuid.New()
	b.exec("INSERT INTO users (id, email) VALUES ($1, 'a@example.com')", owner)
	const events, teams = 100, 2
	for i := range teams {
		b.team = uuid.New()
		b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
		b.exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", b.team, owner)
		name, address := "c", fmt.Sprintf("ops%d@example.com", i)
		if _, err := b.Create(t.Context(), b.team, true, Params{Kind: Email, Name: &name, Events: []string{"sandbox.started"}, Address: &address}); err != nil {
			t.Fatal(err)
		}
		b.exec("UPDATE channels SET confirmed_at = now()")
		for range events {
			b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", b.team)
		}
	}
	begun := time.Now()
	b.run()
	var sent, due, tried int
	b.eventually("the rest waits", func() bool {
		err := b.conn.QueryRow(t.Context(), "SELECT count(*) FILTER (WHERE state = 'delivered'), count(*) FILTER (WHERE state = 'pending' AND next_at < now() + interval '10 seconds'), count(*) FILTER (WHERE state = 'pending' AND attempts > 0) FROM deliveries").Scan(&sent, &due, &tried)
		return err == nil && due == 0 && tried == 0
	})
	if most := limitEvents.Burst + 1 + int(time.Since(begun).Seconds()); sent < limitEvents.Burst || sent > most || sent > events*teams {
		t.Errorf("%d mails were sent, want %d", sent, limitEvents.Burst)
	}
}

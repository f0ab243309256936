package mail_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/mail/mailtest"
)

// log is a log that can be read concurrently.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

const secret = "hunter2%"

// url returns a server's URL; scheme selects plain SMTP or TLS.
func url(scheme string, s *mailtest.Server, query string) string {
	return scheme + "://wrenn:hunter2%25@" + s.Addr + query
}

// TestSender sends mails by real SMTP over TLS to a server that requires a login. It
// sends none to servers that cannot prove their identity, or that would get the password
// in clear.
func TestSender(t *testing.T) {
	ours, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	others, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	// Go reads the system's certificates when it first needs them, which is below.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), ours.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", filepath.Join(dir, "ca.pem"))
	t.Setenv("SSL_CERT_DIR", t.TempDir())
	message := mail.Message{To: "ada@example.com", Subject: "Grüße", Text: "One line that is far longer than what fits into one of a mail's lines, with = and ü: http://localhost:8000/verify#token=wrv_x\nand another.\n"}
	for name, c := range map[string]struct {
		scheme, query string
		options       mailtest.Options
		arrives, tls  bool
		logins        int
	}{
		"STARTTLS":             {"smtp", "", mailtest.Options{Certificate: mailtest.Certificate(t, ours), User: "wrenn", Password: secret}, true, true, 1},
		"TLS from the start":   {"smtps", "", mailtest.Options{Certificate: mailtest.Certificate(t, ours), Implicit: true, User: "wrenn", Password: secret}, true, true, 1},
		"a wrong password":     {"smtp", "", mailtest.Options{Certificate: mailtest.Certificate(t, ours), User: "wrenn", Password: "another"}, false, true, 1},
		"no TLS":               {"smtp", "", mailtest.Options{User: "wrenn", Password: secret}, false, false, 0},
		"somebody else's":      {"smtp", "", mailtest.Options{Certificate: mailtest.Certificate(t, others), User: "wrenn", Password: secret}, false, false, 0},
		"somebody else's, TLS": {"smtps", "", mailtest.Options{Certificate: mailtest.Certificate(t, others), Implicit: true, User: "wrenn", Password: secret}, false, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			server := mailtest.Start(t, c.options)
			s, err := mail.New(url(c.scheme, server, c.query), "wrenn@example.com", slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			err = s.SendNow(t.Context(), message)
			if (err == nil) != c.arrives || err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("sent: %v", err)
			}
			if n := server.Logins(); n != c.logins {
				t.Errorf("%d logins, want %d", n, c.logins)
			}
			if !c.arrives || err != nil {
				return
			}
			want := mailtest.Message{From: "wrenn@example.com", To: message.To, Subject: message.Subject, Text: message.Text, TLS: c.tls, User: "wrenn"}
			got := <-server.Messages
			got.Text = strings.ReplaceAll(got.Text, "\r\n", "\n")
			if got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
		})
	}

	// A busy server gets the mail later. A mail's text never becomes a header.
	var said log
	server := mailtest.Start(t, mailtest.Options{Certificate: mailtest.Certificate(t, ours), User: "wrenn", Password: secret, Busy: 1})
	s, err := mail.New(url("smtp", server, ""), "wrenn@example.com", slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendNow(t.Context(), mail.Message{To: "ada@example.com\r\nBcc: eve@example.com", Subject: "x"}); err == nil {
		t.Error("a line break in an address is accepted")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	s.Send(message)
	select {
	case got := <-server.Messages:
		if got.To != message.To {
			t.Errorf("%+v", got)
		}
	case <-time.After(2 * time.Minute):
		t.Errorf("no mail came; log:\n%s", said.String())
	}
	// Queued mails are sent when the server stops.
	s.Send(mail.Message{To: "bob@example.com", Subject: "last", Text: "x"})
	cancel()
	<-done
	select {
	case got := <-server.Messages:
		if got.To != "bob@example.com" {
			t.Errorf("%+v", got)
		}
	default:
		t.Error("the last mail was not sent")
	}
	if strings.Contains(said.String(), secret) {
		t.Errorf("the log has the password:\n%s", said.String())
	}
}

// TestLog has no mail server: the log has the mails.
func TestLog(t *testing.T) {
	var said log
	s, err := mail.New("", "", slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Send(mail.Message{To: "ada@example.com", Subject: "Your Wrenn password", Text: "http://localhost:8000/reset-password#token=wrp_x"})
	s.Run(ctx)
	for _, want := range []string{"ada@example.com", "Your Wrenn password", "token=wrp_x"} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("the log has no %q:\n%s", want, said.String())
		}
	}
	if err := s.SendNow(t.Context(), mail.Message{}); !errors.Is(err, mail.ErrNoServer) {
		t.Errorf("SendNow: %v", err)
	}
	for _, bad := range []string{"mail.example.com", "http://mail.example.com", "smtp://", "smtp://wrenn:hunter2%25@mail.example.com:x", "smtp://wrenn:hunter2%@mail"} {
		if _, err := mail.New(bad, "wrenn@example.com", slog.Default()); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := mail.New("smtp://mail.example.com", "", slog.Default()); err == nil {
		t.Error("mails have no sender")
	}
}

// TestSlowMail makes the mail server hang on one mail: the others arrive.
func TestSlowMail(t *testing.T) {
	server := mailtest.Start(t, mailtest.Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	hangs := make(chan net.Conn)
	go func() {
		for n := 0; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if n == 0 {
				hangs <- conn // Nothing is ever sent on it.
				continue
			}
			to, err := net.Dial("tcp", server.Addr)
			if err != nil {
				conn.Close()
				continue
			}
			go func() { _, _ = io.Copy(to, conn); to.Close() }()
			go func() { _, _ = io.Copy(conn, to); conn.Close() }()
		}
	}()
	s, err := mail.New("smtp://"+l.Addr().String()+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	begun := time.Now()
	s.Send(mail.Message{To: "slow@example.com", Subject: "x", Text: "x"})
	slow := <-hangs
	for _, to := range []string{"ada@example.com", "bob@example.com"} {
		s.Send(mail.Message{To: to, Subject: "x", Text: "x"})
		if got := <-server.Messages; got.To != to {
			t.Errorf("%+v, want one to %s", got, to)
		}
	}
	if took := time.Since(begun); took > 25*time.Second {
		t.Errorf("they waited %v for the mail that hangs", took)
	}
	slow.Close()
	l.Close()
	cancel()
	<-done
}

// TestDeferredMails queues mails that the server always defers: a mail after them does not
// wait for their retries.
func TestDeferredMails(t *testing.T) {
	const mails, attempts = 20, 4
	var deferred atomic.Int32
	server := mailtest.Start(t, mailtest.Options{Defers: func(to string) bool {
		if to != "ada@example.com" {
			deferred.Add(1)
			return true
		}
		return false
	}})
	s, err := mail.New("smtp://"+server.Addr+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	for range mails {
		s.Send(mail.Message{To: "full@example.com", Subject: "x", Text: "x"})
	}
	s.Send(mail.Message{To: "ada@example.com", Subject: "x", Text: "x"})
	select {
	case got := <-server.Messages:
		// If it waited, all but the mails being retried have had all their attempts.
		if n := deferred.Load(); n > mails*attempts/2 {
			t.Errorf("%+v came after %d attempts for the mails before it", got, n)
		}
	case <-time.After(2 * time.Minute):
		t.Error("no mail came")
	}
	cancel()
	<-done
}

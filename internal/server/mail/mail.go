// Package mail sends mails, or writes them to the log if no mail server is configured.
package mail

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"sync"
	"time"

	gomail "github.com/wneessen/go-mail"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// sendWithin bounds one attempt to send a mail.
	sendWithin = 30 * time.Second
	// attempts is how many attempts a mail gets.
	attempts = 4
	// waiting bounds the queue. The sender drops and logs further mails.
	waiting = 256
	// lastWords is how long the sender still sends queued mails when the server stops.
	lastWords = 5 * time.Second
	// workers is how many mails are sent at once, and how many failed ones are retried at
	// once, so that a slow one does not delay others.
	workers = 4
)

// Message is a plain-text mail to one address.
type Message struct{ To, Subject, Text string }

// Sender sends mails while [Sender.Run] runs.
type Sender struct {
	client *gomail.Client
	from   string
	log    *slog.Logger
	queue  chan Message
	// failed has mails whose first attempt failed. Their retries have their own workers,
	// so that a recipient whose mails fail delays no mail to others.
	failed chan Message
}

// New returns a sender. server is smtp://user:password@host:port (requires STARTTLS
// before the password), smtps://… (TLS from the start), smtp://…?tls=none (for a relay on
// the same machine), or empty (write mails to the log). from is the sender's address.
func New(server, from string, log *slog.Logger) (*Sender, error) {
	s := &Sender{from: from, log: log, queue: make(chan Message, waiting), failed: make(chan Message, waiting)}
	if server == "" {
		return s, nil
	}
	bad := errors.New("read WRENN_SMTP_URL: want smtp://user:password@host:port or smtps://…")
	u, err := url.Parse(server)
	if err != nil || u.Hostname() == "" || u.Scheme != "smtp" && u.Scheme != "smtps" {
		return nil, bad // Do not wrap err: it may contain the password.
	}
	if from == "" {
		return nil, errors.New("WRENN_MAIL_FROM must be set to the address that mail comes from")
	}
	opts := []gomail.Option{gomail.WithTimeout(sendWithin), gomail.WithTLSPolicy(gomail.TLSMandatory)}
	if u.Scheme == "smtps" {
		opts = append(opts, gomail.WithSSL())
	} else if u.Query().Get("tls") == "none" {
		opts = append(opts, gomail.WithTLSPolicy(gomail.NoTLS))
	}
	if p := u.Port(); p != "" {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil, bad
		}
		opts = append(opts, gomail.WithPort(n))
	} else if u.Scheme == "smtps" {
		opts = append(opts, gomail.WithPort(465))
	} else {
		opts = append(opts, gomail.WithPort(587))
	}
	if u.User != nil {
		password, _ := u.User.Password()
		opts = append(opts, gomail.WithSMTPAuth(gomail.SMTPAuthAutoDiscover), gomail.WithUsername(u.User.Username()), gomail.WithPassword(password))
	}
	if s.client, err = gomail.NewClient(u.Hostname(), opts...); err != nil {
		return nil, bad
	}
	return s, nil
}

// Send queues a mail and returns at once.
func (s *Sender) Send(m Message) {
	select {
	case s.queue <- m:
	default:
		s.log.Error("mail queue is full: dropping a mail", "subject", m.Subject)
	}
}

// Run sends mails until ctx is done, and then the queued ones for up to lastWords.
func (s *Sender) Run(ctx context.Context) {
	last, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(lastWords, cancel) })
	defer stop()
	var first, again sync.WaitGroup
	for range workers {
		first.Go(func() { s.work(ctx, last) })
		again.Go(func() {
			for message := range s.failed {
				s.retry(last, message)
			}
		})
	}
	first.Wait()
	close(s.failed)
	again.Wait()
}

// work sends mails until ctx is done, and then the queued ones.
func (s *Sender) work(ctx, last context.Context) {
	for {
		select {
		case message := <-s.queue:
			s.deliver(last, message)
			continue
		case <-ctx.Done():
		}
		break
	}
	for {
		select {
		case message := <-s.queue:
			s.deliver(last, message)
		default:
			return
		}
	}
}

// deliver makes the first attempt to send a mail.
func (s *Sender) deliver(ctx context.Context, message Message) {
	if s.client == nil {
		s.log.Info("no mail server is configured: writing mail to the log", "to", message.To, "subject", message.Subject, "text", message.Text)
		return
	}
	err := s.try(ctx, message)
	if err == nil {
		return
	}
	select {
	case s.failed <- message:
		s.log.Warn("send mail: retrying", "subject", message.Subject, "error", err)
	default:
		s.log.Error("send mail: not retrying, because too many mails wait for a retry", "subject", message.Subject, "error", err)
	}
}

// retry makes the further attempts to send a mail.
func (s *Sender) retry(ctx context.Context, message Message) {
	waits := backoff.New(time.Second, 10*time.Second)
	for n := 2; ; n++ {
		err := waits.Wait(ctx)
		if err == nil {
			err = s.try(ctx, message)
		}
		if err == nil {
			return
		}
		if n == attempts || ctx.Err() != nil {
			s.log.Error("send mail", "subject", message.Subject, "error", err)
			return
		}
	}
}

// try makes one attempt. A panic is an error.
func (s *Sender) try(ctx context.Context, message Message) error {
	return fault.Guard(s.log, func() error { return s.send(ctx, message) })
}

func (s *Sender) send(ctx context.Context, message Message) error {
	m := gomail.NewMsg()
	if err := m.From(s.from); err != nil {
		return fmt.Errorf("sender's address: %w", err)
	}
	if err := m.To(message.To); err != nil {
		return fmt.Errorf("recipient's address: %w", err)
	}
	m.Subject(message.Subject)
	m.SetBodyString(gomail.TypeTextPlain, message.Text)
	ctx, cancel := context.WithTimeout(ctx, sendWithin)
	defer cancel()
	return s.client.DialAndSendWithContext(ctx, m)
}

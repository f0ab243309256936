// Package mailtest provides a mail server for tests.
package mailtest

import (
	"crypto/tls"
	"io"
	"mime"
	"mime/quotedprintable"
	"net"
	"net/mail"
	"sync"
	"testing"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/pki"
)

// Message is a mail that the server accepted.
type Message struct {
	From, To, Subject, Text string
	// TLS reports whether it arrived over TLS. User is the login that sent it.
	TLS  bool
	User string
}

// Options configures a server.
type Options struct {
	// Certificate, if set, enables TLS: by STARTTLS, or from the start if Implicit.
	Certificate *tls.Certificate
	Implicit    bool
	// User must log in with Password; empty: no login needed.
	User, Password string
	// Busy is how many mails the server defers before it accepts one.
	Busy int
	// Defers, if set, decides about each recipient whether the server defers the mail.
	Defers func(to string) bool
}

// Server is a mail server on loopback.
type Server struct {
	// Addr is the server's address. Messages receives the accepted mails.
	Addr     string
	Messages <-chan Message

	options  Options
	messages chan Message

	mu     sync.Mutex
	busy   int
	logins int
}

// Start starts a server, and stops it when the test ends.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s := &Server{options: o, messages: make(chan Message, 16), busy: o.Busy}
	s.Messages = s.messages
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Addr = l.Addr().String()
	server := smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) { return &session{server: s, conn: c}, nil }))
	server.AllowInsecureAuth = true // to detect clients that send passwords in clear
	server.ErrorLog = quiet{}
	if o.Certificate != nil {
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{*o.Certificate}, MinVersion: tls.VersionTLS12}
	}
	if o.Implicit {
		l = tls.NewListener(l, server.TLSConfig)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() {
		_ = server.Close()
		_ = l.Close() // in case it does not serve yet
		<-done
	})
	return s
}

// Logins returns the number of login attempts.
func (s *Server) Logins() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins
}

type quiet struct{}

func (quiet) Printf(string, ...any) {}
func (quiet) Println(...any)        {}

type session struct {
	server  *Server
	conn    *smtp.Conn
	user    string
	message Message
}

// AuthMechanisms implements [smtp.AuthSession].
func (s *session) AuthMechanisms() []string { return []string{sasl.Plain} }

// Auth implements [smtp.AuthSession].
func (s *session) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		s.server.mu.Lock()
		s.server.logins++
		s.server.mu.Unlock()
		if user != s.server.options.User || password != s.server.options.Password {
			return smtp.ErrAuthFailed
		}
		s.user = user
		return nil
	}), nil
}

// Reset implements [smtp.Session].
func (s *session) Reset() { s.message = Message{} }

// Logout implements [smtp.Session].
func (s *session) Logout() error { return nil }

// Mail implements [smtp.Session].
func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	if s.server.options.User != "" && s.user == "" {
		return smtp.ErrAuthRequired
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if s.server.busy > 0 {
		s.server.busy--
		return &smtp.SMTPError{Code: 451, EnhancedCode: smtp.EnhancedCode{4, 3, 2}, Message: "busy"}
	}
	s.message.From = from
	return nil
}

// Rcpt implements [smtp.Session].
func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	if defers := s.server.options.Defers; defers != nil && defers(to) {
		return &smtp.SMTPError{Code: 450, EnhancedCode: smtp.EnhancedCode{4, 2, 0}, Message: "try again later"}
	}
	s.message.To += to
	return nil
}

// Data implements [smtp.Session].
func (s *session) Data(r io.Reader) error {
	m, err := mail.ReadMessage(r)
	if err != nil {
		return err
	}
	if s.message.Subject, err = new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject")); err != nil {
		return err
	}
	body := m.Body
	if m.Header.Get("Content-Transfer-Encoding") == "quoted-printable" {
		body = quotedprintable.NewReader(body)
	}
	text, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	s.message.Text, s.message.User = string(text), s.user
	_, s.message.TLS = s.conn.TLSConnectionState()
	if s.server.options.Implicit {
		s.message.TLS = true
	}
	s.server.messages <- s.message
	return nil
}

// Certificate returns a certificate for 127.0.0.1 that the authority signed.
func Certificate(t testing.TB, a *pki.Authority) *tls.Certificate {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	request, err := pki.NewRequest(key, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	_, leaf, err := a.SignHost(request, uuid.New(), "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}
}

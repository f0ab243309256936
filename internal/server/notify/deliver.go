package notify

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
)

// errInternal replaces internal errors for users.
var errInternal = errors.New("internal error")

// client posts messages to addresses that its policy allows. It follows no redirects. It
// uses no HTTP proxy, because a proxy would resolve names itself.
type client struct{ http *http.Client }

// policy returns the addresses that messages may go to. private allows private ones.
func policy(private bool) netaddr.Policy {
	return netaddr.Policy{Loopback: private, Private: private}
}

func newClient(private bool) *client {
	d := &net.Dialer{Timeout: 10 * time.Second, Control: policy(private).Control}
	return &client{&http.Client{
		Transport: &http.Transport{
			DialContext: d.DialContext, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: tryWithin,
			MaxResponseHeaderBytes: 64 << 10, MaxIdleConnsPerHost: 1, IdleConnTimeout: 30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// outcome is the result of an attempt. status is the HTTP status; 0: no response.
type outcome struct {
	status int
	took   time.Duration
	err    error
}

// refused is the error for a response with a status other than 2xx.
type refused int

func (r refused) Error() string { return fmt.Sprintf("the receiver responded with status %d", int(r)) }

// problem returns the error for the team. It hides what the dialler, TLS or the mail
// server reported, because that names addresses that teams must not learn.
func (o outcome) problem() string {
	var status refused
	var timeout net.Error
	switch {
	case o.err == nil:
		return ""
	case errors.As(o.err, &status):
		return status.Error()
	case errors.Is(o.err, netaddr.ErrNotAllowed):
		return netaddr.ErrNotAllowed.Error()
	case errors.Is(o.err, errSealed), errors.Is(o.err, errInternal), errors.Is(o.err, mail.ErrNoServer):
		return o.err.Error()
	case errors.Is(o.err, context.DeadlineExceeded), errors.As(o.err, &timeout) && timeout.Timeout():
		return "the receiver did not respond in time"
	}
	return "cannot connect, or the connection closed early"
}

// deliver makes one attempt at a delivery.
func (s *Service) deliver(ctx context.Context, c db.Channel, d db.Delivery) outcome {
	ctx, cancel := context.WithTimeout(ctx, tryWithin)
	defer cancel()
	begun := time.Now()
	var status int
	err := fault.Guard(s.Log, func() (err error) {
		status, err = s.send(ctx, c, d)
		return err
	})
	var bug *fault.Panic
	if errors.As(err, &bug) {
		err = errInternal
	}
	if err != nil {
		s.Log.Info("deliver event", "channel", c.ID, "delivery", d.ID, "kind", c.Kind, "error", withoutURL(err))
	}
	return outcome{status, time.Since(begun), err}
}

// withoutURL removes the URL, which can be a secret, from an error of net/http.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func (s *Service) send(ctx context.Context, c db.Channel, d db.Delivery) (int, error) {
	t, err := s.open(c)
	if err != nil {
		return 0, err
	}
	m, err := message(c, d)
	if err != nil {
		return 0, err
	}
	header := http.Header{}
	var body any
	switch c.Kind {
	case Email:
		return 0, s.Mail.SendNow(ctx, mail.Message{To: t.Address, Subject: "Wrenn: " + m.Event, Text: m.text() + "\n"})
	case Slack:
		body = map[string]any{"text": strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(m.text())}
	case Discord:
		// Names in the text, such as a template's, must not mention anybody.
		body = map[string]any{"content": m.text(), "allowed_mentions": map[string]any{"parse": []string{}}}
	case Webhook:
		body = m
	default:
		return 0, fmt.Errorf("kind %q has no message", c.Kind)
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return 0, err
	}
	if c.Kind == Webhook {
		header.Set("Wrenn-Event", m.Event)
		header.Set("Wrenn-Delivery", m.ID.String())
		header.Set("Wrenn-Signature", Sign(t.Secret, time.Now(), raw))
	}
	return s.client.post(ctx, t.URL, header, raw)
}

func (c *client) post(ctx context.Context, to string, header http.Header, body []byte) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header = header
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "wrenn-notify")
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be reused
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return resp.StatusCode, refused(resp.StatusCode)
	}
	return resp.StatusCode, nil
}

// Sign returns the value of the header Wrenn-Signature for a webhook's body:
// "t=SECONDS,v1=HEX". SECONDS is the time since 1970. HEX is the HMAC-SHA256, with the
// channel's secret, of SECONDS, a dot and the body.
func Sign(secret string, at time.Time, body []byte) string {
	t := strconv.FormatInt(at.Unix(), 10)
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte(t + "."))
	m.Write(body)
	return "t=" + t + ",v1=" + hex.EncodeToString(m.Sum(nil))
}

// Message is the JSON body of a webhook.
type Message struct {
	ID     uuid.UUID      `json:"id"`
	Event  string         `json:"event"`
	At     string         `json:"at"`
	TeamID string         `json:"team_id"`
	Data   map[string]any `json:"data"`
}

// prefixes maps fields of events to the prefix of their public ids.
var prefixes = map[string]id.Kind{"sandbox": id.Sandbox, "host": id.Host, "build": id.Build}

// message builds the message of a delivery, with public ids.
func message(c db.Channel, d db.Delivery) (Message, error) {
	m := Message{ID: d.ID, Event: d.Event, TeamID: id.Format(id.Team, c.TeamID), Data: map[string]any{}}
	var said map[string]any
	if err := json.Unmarshal(d.Body, &said); err != nil {
		return m, fmt.Errorf("decode event: %w", err)
	}
	for name, v := range said {
		text, _ := v.(string)
		kind, isID := prefixes[name]
		u, err := uuid.Parse(text)
		switch {
		case v == nil:
		case name == "at":
			m.At = text
		case isID && err == nil:
			m.Data[name+"_id"] = id.Format(kind, u)
		default:
			m.Data[name] = v
		}
	}
	return m, nil
}

// text returns the message as one line for people.
func (m Message) text() string {
	field := func(name string) string {
		text, _ := m.Data[name].(string)
		return strings.Map(func(r rune) rune {
			if r < ' ' {
				return ' '
			}
			return r
		}, text)
	}
	var text string
	switch m.Event {
	case TestEvent:
		text = "This is a test of a notification channel."
	case QuotaReached:
		text = "The team's quota is reached."
	case "build.finished":
		text = fmt.Sprintf("Build of %s %s (%s).", field("name"), field("state"), field("build_id"))
	case "host.unreachable", "host.online":
		text = fmt.Sprintf("Host %s (%s) is %s.", field("name"), field("host_id"), strings.TrimPrefix(m.Event, platformPrefix))
	default:
		text = fmt.Sprintf("Sandbox %s (%s): %s.", field("sandbox_id"), field("template"), strings.TrimPrefix(m.Event, "sandbox."))
		if why := field("reason"); why != "" {
			text += " Reason: " + why + "."
		}
	}
	if why := field("error"); why != "" {
		text += " " + why
	}
	return text
}

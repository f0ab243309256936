// Package notify sends events to teams' channels: webhooks, Slack, Discord and mail.
//
// The transaction that causes an event inserts a delivery for each channel that
// subscribes to it. The database notifies servers of new deliveries. A server claims due
// deliveries and retries each until it succeeds or its attempts are used up. If the
// server dies, the claim expires and another server tries again. So a receiver can get a
// delivery twice, with the same id.
package notify

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	netmail "net/mail"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Kinds of channels.
const (
	Webhook = "webhook"
	Slack   = "slack"
	Discord = "discord"
	Email   = "email"
)

// kinds are all kinds, as in the database and in the API document.
var kinds = []string{Webhook, Slack, Discord, Email}

// platformPrefix begins the names of the platform's events, to which only its admins may
// subscribe.
const platformPrefix = "host."

// TestEvent is the event that tests a channel.
const TestEvent = "test"

// QuotaReached is the event for a request that exceeded the team's quota.
const QuotaReached = "quota.reached"

// quotaEvery is the minimum interval between two QuotaReached events of a team.
const quotaEvery = time.Hour

const (
	maxChannels = 50 // of a team
	maxURL      = 2048
	minSecret   = 16
)

// Config configures a [Service].
type Config struct {
	Store *store.Store
	// Secret is the installation's secret.
	Secret []byte
	Mail   *mail.Sender
	// Limiter limits confirmation mails.
	Limiter *ratelimit.Limiter
	// PublicURL is the service's URL in mails.
	PublicURL string
	// Private allows deliveries to private addresses.
	Private bool
	Log     *slog.Logger
}

// Service manages the channels of all teams.
type Service struct {
	Config
	client *client
	key    []byte
	wake   chan struct{}
}

// New returns a service. [Service.Run] delivers the events.
func New(c Config) (*Service, error) {
	key, err := hkdf.Key(sha256.New, c.Secret, nil, "wrenn notification channels", chacha20poly1305.KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive key for channels' secrets: %w", err)
	}
	return &Service{Config: c, client: newClient(c.Private), key: key, wake: make(chan struct{}, 1)}, nil
}

// target is where a channel's messages go. The database stores it encrypted.
type target struct {
	// URL is for all kinds but mail. Those of Slack and Discord are secrets.
	URL string `json:"url,omitempty"`
	// Secret signs a webhook's messages.
	Secret string `json:"secret,omitempty"`
	// Address is for mail.
	Address string `json:"address,omitempty"`
}

// seal encrypts a channel's target: a random nonce of 24 bytes, then
// XChaCha20-Poly1305 of its JSON, bound to the channel's id.
func (s *Service) seal(channel uuid.UUID, t target) ([]byte, error) {
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	aead, err := chacha20poly1305.NewX(s.key)
	if err != nil {
		return nil, err
	}
	nonce := nonce()
	return aead.Seal(nonce, nonce, plain, channel[:]), nil
}

// errSealed is the error of a channel whose target cannot be decrypted.
var errSealed = errors.New("cannot decrypt the channel's secrets: they were encrypted with another WRENN_SECRET_KEY")

func (s *Service) open(c db.Channel) (target, error) {
	var t target
	aead, err := chacha20poly1305.NewX(s.key)
	if err != nil {
		return t, err
	}
	if len(c.Sealed) < aead.NonceSize() {
		return t, errSealed
	}
	plain, err := aead.Open(nil, c.Sealed[:aead.NonceSize()], c.Sealed[aead.NonceSize():], c.ID[:])
	if err != nil {
		return t, errSealed
	}
	return t, json.Unmarshal(plain, &t)
}

// Params describes a channel to create or an update. In an update, nil fields stay
// unchanged and Kind is ignored.
type Params struct {
	Kind    string
	Name    *string
	Events  []string
	URL     *string
	Secret  *string
	Address *string
	Enabled *bool
}

// check fails with invalid_argument if a target does not fit the kind.
func (s *Service) check(kind string, t target) error {
	if !slices.Contains(kinds, kind) {
		return fault.New(fault.InvalidArgument, "kind: %q is not a kind of channel", kind)
	}
	if kind == Email {
		if t.URL != "" || t.Secret != "" {
			return fault.New(fault.InvalidArgument, "a mail channel has no url and no secret")
		}
		a, err := netmail.ParseAddress(t.Address)
		if err != nil || a.Address != t.Address || len(t.Address) > 254 || strings.ContainsAny(t.Address, "\r\n") {
			return fault.New(fault.InvalidArgument, "address: not a mail address")
		}
		return nil
	}
	u, err := url.Parse(t.URL)
	switch {
	case t.Address != "":
		return fault.New(fault.InvalidArgument, "only a mail channel has an address")
	case err != nil || len(t.URL) > maxURL || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http":
		return fault.New(fault.InvalidArgument, "url: want https://host/…")
	case u.User != nil:
		return fault.New(fault.InvalidArgument, "url: must not have a user and a password")
	case kind != Webhook && t.Secret != "":
		return fault.New(fault.InvalidArgument, "only a webhook has a secret")
	case kind == Webhook && len(t.Secret) < minSecret:
		return fault.New(fault.InvalidArgument, "secret: must have at least %d characters", minSecret)
	}
	// The client checks names when it resolves them.
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && policy(s.Private).Check(ip) != nil {
		return fault.New(fault.InvalidArgument, "url: %v", netaddr.ErrNotAllowed)
	}
	return nil
}

// shown returns the part of a target that users may see.
func (t target) shown() string {
	if t.Address != "" {
		return t.Address
	}
	u, err := url.Parse(t.URL)
	if err != nil {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

func checkEvents(events []string, admin bool) error {
	for _, e := range events {
		if strings.HasPrefix(e, platformPrefix) && !admin {
			return fault.New(fault.PermissionDenied, "events: only the platform's admins may subscribe to %q", e)
		}
	}
	return nil
}

// Create creates a channel for a team. admin reports whether the caller is an admin of
// the platform. For mail, it sends the recipient a confirmation mail.
func (s *Service) Create(ctx context.Context, team uuid.UUID, admin bool, p Params) (db.Channel, error) {
	t := target{}
	t.apply(p)
	if err := errors.Join(s.check(p.Kind, t), checkEvents(p.Events, admin)); err != nil {
		return db.Channel{}, first(err)
	}
	channel := uuid.New()
	sealed, err := s.seal(channel, t)
	if err != nil {
		return db.Channel{}, fmt.Errorf("encrypt channel's secrets: %w", err)
	}
	var c confirmation
	if p.Kind == Email {
		if c, err = s.confirmation(ctx, team, t.Address); err != nil {
			return db.Channel{}, err
		}
	}
	var row db.Channel
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockLimit(ctx, db.LockLimitParams{What: "channels", TeamID: team}); err != nil {
			return err
		}
		n, err := q.CountChannels(ctx, team)
		if err != nil {
			return err
		}
		if n >= maxChannels {
			return fault.New(fault.Conflict, "a team has at most %d channels", maxChannels)
		}
		row, err = q.InsertChannel(ctx, db.InsertChannelParams{
			ID: channel, TeamID: team, Name: *p.Name, Kind: p.Kind, Events: unique(p.Events), Target: t.shown(), Sealed: sealed, ConfirmHash: c.hash, ConfirmUntil: c.until,
		})
		return err
	})
	if fault.Is(err, fault.Conflict) {
		return row, err
	}
	if err != nil {
		return row, fmt.Errorf("insert channel: %w", err)
	}
	s.ask(row, c)
	return row, nil
}

func (t *target) apply(p Params) {
	for _, f := range []struct{ to, from *string }{{&t.URL, p.URL}, {&t.Secret, p.Secret}, {&t.Address, p.Address}} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
}

// first returns the first fault of joined errors.
func first(err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return f
	}
	return err
}

func unique(events []string) []string {
	events = slices.Clone(events)
	slices.Sort(events)
	return slices.Compact(events)
}

// Get returns a team's channel, or fails with not_found.
func (s *Service) Get(ctx context.Context, team, channel uuid.UUID) (db.Channel, error) {
	row, err := s.Store.GetTeamChannel(ctx, db.GetTeamChannelParams{ID: channel, TeamID: team})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such channel")
	}
	if err != nil {
		return row, fmt.Errorf("look up channel: %w", err)
	}
	return row, nil
}

// List returns a team's channels, oldest first.
func (s *Service) List(ctx context.Context, team uuid.UUID) ([]db.Channel, error) {
	rows, err := s.Store.ListChannels(ctx, team)
	if err != nil {
		return nil, fmt.Errorf("list channels: %w", err)
	}
	return rows, nil
}

// Update updates a channel. Enabling it resets its failures. A new mail address must be
// confirmed.
func (s *Service) Update(ctx context.Context, team, channel uuid.UUID, admin bool, p Params) (db.Channel, error) {
	row, err := s.Get(ctx, team, channel)
	if err != nil {
		return row, err
	}
	change := db.UpdateChannelParams{ID: channel, TeamID: team, Name: p.Name, Enabled: p.Enabled}
	if p.Events != nil {
		if err := checkEvents(p.Events, admin); err != nil {
			return row, err
		}
		change.Events = unique(p.Events)
	}
	var c confirmation
	if p.URL != nil || p.Secret != nil || p.Address != nil {
		// If the old target cannot be decrypted, the request must contain a complete one.
		t, _ := s.open(row)
		t.apply(p)
		if err := s.check(row.Kind, t); err != nil {
			return row, err
		}
		if change.Sealed, err = s.seal(channel, t); err != nil {
			return row, fmt.Errorf("encrypt channel's secrets: %w", err)
		}
		shown := t.shown()
		change.Target = &shown
		if row.Kind == Email && !strings.EqualFold(shown, row.Target) {
			if c, err = s.confirmation(ctx, team, shown); err != nil {
				return row, err
			}
			change.ConfirmHash, change.ConfirmUntil = c.hash, c.until
		}
	}
	if row, err = s.Store.UpdateChannel(ctx, change); errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such channel")
	}
	if err != nil {
		return row, fmt.Errorf("update channel: %w", err)
	}
	s.ask(row, c)
	return row, nil
}

// Delete deletes a channel and its deliveries.
func (s *Service) Delete(ctx context.Context, team, channel uuid.UUID) error {
	n, err := s.Store.DeleteChannel(ctx, db.DeleteChannelParams{ID: channel, TeamID: team})
	if err != nil {
		return fmt.Errorf("delete channel: %w", err)
	}
	if n == 0 {
		return fault.New(fault.NotFound, "no such channel")
	}
	return nil
}

// Test sends a test message to a team's channel now and returns the delivery. It fails
// with conflict if the recipient has not confirmed the address.
func (s *Service) Test(ctx context.Context, team, channel uuid.UUID) (db.Delivery, error) {
	row, err := s.Get(ctx, team, channel)
	if err != nil {
		return db.Delivery{}, err
	}
	if !Confirmed(row) {
		return db.Delivery{}, fault.New(fault.Conflict, "%v: a mail asks them to", errUnconfirmed)
	}
	body, err := json.Marshal(map[string]any{"at": time.Now().UTC()})
	if err != nil {
		return db.Delivery{}, err
	}
	d, err := s.Store.InsertDelivery(ctx, db.InsertDeliveryParams{ID: uuid.New(), ChannelID: row.ID, Event: TestEvent, Body: body})
	if err != nil {
		return d, fmt.Errorf("insert delivery: %w", err)
	}
	out := s.deliver(ctx, row, d)
	d.State, d.Status, d.Error, d.TookMs = "delivered", int32(out.status), out.problem(), out.took.Milliseconds()
	if out.err != nil {
		d.State = "failed"
	}
	err = s.Store.DeliveryTried(context.WithoutCancel(ctx), db.DeliveryTriedParams{ID: d.ID, State: d.State, TookMs: d.TookMs, Status: d.Status, Error: d.Error})
	if err != nil {
		return d, fmt.Errorf("insert delivery: %w", err)
	}
	return d, nil
}

// Deliveries returns a page of a channel's deliveries, newest first, and the cursor of
// the next page ("" on the last).
func (s *Service) Deliveries(ctx context.Context, team, channel uuid.UUID, cursor string, limit int) ([]db.Delivery, string, error) {
	if _, err := s.Get(ctx, team, channel); err != nil {
		return nil, "", err
	}
	at, before, err := page.Newest(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.Store.ListDeliveries(ctx, db.ListDeliveriesParams{ChannelID: channel, BeforeAt: at, BeforeID: before, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list deliveries: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(d db.Delivery) string { return page.Time(d.CreatedAt, d.ID) })
	return rows, next, nil
}

// Quota emits a QuotaReached event for a team, at most once per quotaEvery.
func (s *Service) Quota(ctx context.Context, team uuid.UUID, why string) error {
	told, err := s.Store.WasTold(ctx, db.WasToldParams{TeamID: team, Event: QuotaReached, Secs: quotaEvery.Seconds()})
	if err != nil || told {
		return err
	}
	if !utf8.ValidString(why) {
		why = ""
	}
	body, err := json.Marshal(map[string]any{"at": time.Now().UTC(), "error": why})
	if err != nil {
		return err
	}
	return s.Store.EmitEvent(ctx, db.EmitEventParams{Team: team, Event: QuotaReached, Body: body})
}

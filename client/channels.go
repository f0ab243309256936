package client

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ChannelKinds are the kinds of channels. A channel of the kind "email" has an address, and
// the others have a URL.
var ChannelKinds = []string{"webhook", "slack", "discord", "email"}

// ChannelEvents are the events that a channel can subscribe to. Only the platform's
// admins can subscribe to those of hosts.
var ChannelEvents = []string{
	"sandbox.started", "sandbox.paused", "sandbox.ended", "sandbox.failed", "sandbox.missing", "sandbox.lost",
	"sandbox.unresponsive", "sandbox.responsive", "sandbox.memory_lost", "build.finished", "quota.reached", "host.unreachable", "host.online",
}

// Channel is a place to which the service sends a team's notifications.
type Channel struct {
	ID             string     `json:"id"`
	TeamID         string     `json:"team_id"`
	Name           string     `json:"name"`
	Kind           string     `json:"kind"` // one of ChannelKinds
	Events         []string   `json:"events"`
	Target         string     `json:"target"` // without its secret parts
	Enabled        bool       `json:"enabled"`
	Confirmed      bool       `json:"confirmed"` // mail: its recipient has; true for other kinds
	DisabledReason string     `json:"disabled_reason,omitempty"`
	FailingSince   *time.Time `json:"failing_since,omitempty"`
	CreatedAt      time.Time  `json:"created_at"`
}

// ChannelOptions configure a new channel.
type ChannelOptions struct {
	Name    string   `json:"name"`
	Kind    string   `json:"kind"`
	Events  []string `json:"events"`
	URL     string   `json:"url,omitempty"`     // webhook, slack, discord
	Secret  string   `json:"secret,omitempty"`  // webhook: signs its messages
	Address string   `json:"address,omitempty"` // email
}

// Delivery is one event on its way to one channel.
type Delivery struct {
	ID        string     `json:"id"`
	Event     string     `json:"event"`
	State     string     `json:"state"` // "pending", "delivered" or "failed"
	CreatedAt time.Time  `json:"created_at"`
	Attempts  int        `json:"attempts"`
	TriedAt   *time.Time `json:"tried_at,omitempty"`
	NextAt    *time.Time `json:"next_at,omitempty"`
	Status    int        `json:"status"` // HTTP status; 0: no answer
	TookMS    int64      `json:"took_ms"`
	Error     string     `json:"error,omitempty"`
}

func channelPath(id, rest string) string { return "/v1/channels/" + url.PathEscape(id) + rest }

// AddChannel adds a channel. The service first asks the recipient of a mail channel to
// confirm the address, and sends nothing else until they have.
func (c *Client) AddChannel(ctx context.Context, o ChannelOptions) (*Channel, error) {
	var ch Channel
	// Not retried: the channel may exist.
	if err := c.call(ctx, request{method: http.MethodPost, path: "/v1/channels", json: o}, &ch); err != nil {
		return nil, fmt.Errorf("add channel: %w", err)
	}
	return &ch, nil
}

// Channels lists the team's channels.
func (c *Client) Channels(ctx context.Context) ([]Channel, error) {
	var list struct {
		Channels []Channel `json:"channels"`
	}
	if err := c.call(ctx, request{method: http.MethodGet, path: "/v1/channels", repeatable: true}, &list); err != nil {
		return nil, fmt.Errorf("list channels: %w", err)
	}
	return list.Channels, nil
}

// EnableChannel turns the notifications of a channel on or off.
func (c *Client) EnableChannel(ctx context.Context, id string, enabled bool) (*Channel, error) {
	body := struct {
		Enabled bool `json:"enabled"`
	}{enabled}
	var ch Channel
	if err := c.call(ctx, request{method: http.MethodPatch, path: channelPath(id, ""), json: body, repeatable: true}, &ch); err != nil {
		return nil, fmt.Errorf("change channel: %w", err)
	}
	return &ch, nil
}

// DeleteChannel removes a channel.
func (c *Client) DeleteChannel(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodDelete, path: channelPath(id, ""), repeatable: true}, nil); err != nil {
		return fmt.Errorf("delete channel: %w", err)
	}
	return nil
}

// AskConfirmation resends the mail that asks the recipient of a mail channel to
// confirm the address. An address gets at most one such mail an hour.
func (c *Client) AskConfirmation(ctx context.Context, id string) error {
	if err := c.call(ctx, request{method: http.MethodPost, path: channelPath(id, "/confirmation")}, nil); err != nil {
		return fmt.Errorf("ask for confirmation: %w", err)
	}
	return nil
}

// TestChannel sends a test notification once, without retries, and returns the result.
func (c *Client) TestChannel(ctx context.Context, id string) (*Delivery, error) {
	var d Delivery
	if err := c.call(ctx, request{method: http.MethodPost, path: channelPath(id, "/test")}, &d); err != nil {
		return nil, fmt.Errorf("test channel: %w", err)
	}
	return &d, nil
}

// Deliveries lists a channel's deliveries, newest first. An error ends the list.
func (c *Client) Deliveries(ctx context.Context, id string) iter.Seq2[Delivery, error] {
	type page struct {
		Deliveries []Delivery `json:"deliveries"`
		Next       string     `json:"next_cursor"`
	}
	return pages(ctx, c, channelPath(id, "/deliveries"), url.Values{}, func(p page) ([]Delivery, string) { return p.Deliveries, p.Next })
}

// VerifyWebhook checks that a webhook request was signed with the channel's secret at
// most tolerance ago (0: 5 minutes). body is the unchanged request body. Do not trust
// the body before VerifyWebhook has returned nil.
func VerifyWebhook(header http.Header, body []byte, secret string, tolerance time.Duration) error {
	if tolerance == 0 {
		tolerance = 5 * time.Minute
	}
	stamp, signature, _ := strings.Cut(header.Get("Wrenn-Signature"), ",")
	t, timed := strings.CutPrefix(stamp, "t=")
	v1, signed := strings.CutPrefix(signature, "v1=")
	secs, err := strconv.ParseInt(t, 10, 64)
	got, hexErr := hex.DecodeString(v1)
	if !timed || !signed || err != nil || hexErr != nil {
		return errors.New("the request has no valid Wrenn-Signature header")
	}
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte(t + "."))
	m.Write(body)
	if !hmac.Equal(got, m.Sum(nil)) {
		return errors.New("the signature does not match the body and the secret")
	}
	if age := time.Since(time.Unix(secs, 0)); age > tolerance || age < -tolerance {
		return fmt.Errorf("the signature was made %v ago, which is not within %v", age.Round(time.Second), tolerance)
	}
	return nil
}

// Package github finds out who somebody is on GitHub, or on a GitHub
// Enterprise, by OAuth: authorization code with PKCE (RFC 6749, RFC 7636).
package github

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/oauth2"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

const (
	within    = 10 * time.Second
	maxAnswer = 1 << 20
)

// ErrNoEmail is what somebody has who has no verified primary address.
var ErrNoEmail = errors.New("no verified primary e-mail address on GitHub")

// Config is an OAuth application registered with GitHub.
type Config struct {
	ClientID, ClientSecret string
	// URL is where people log in, APIURL what is asked about them; empty:
	// https://github.com and https://api.github.com.
	URL, APIURL string
	// Callback is where GitHub sends people back to.
	Callback string
}

// Identity is who somebody is.
type Identity struct {
	// Subject is GitHub's own number of the account.
	Subject string
	// Email is verified and the account's primary one.
	Email string
}

// Client asks GitHub.
type Client struct {
	oauth oauth2.Config
	api   string
	http  *http.Client
}

// New returns a client for an application. It calls public addresses, and those of the
// machine and of private networks only if c names a site of its own. It uses no proxy,
// which would resolve names by itself.
func New(c Config) *Client {
	site, api := "https://github.com", "https://api.github.com"
	if c.URL != "" {
		site = strings.TrimSuffix(c.URL, "/")
	}
	if c.APIURL != "" {
		api = strings.TrimSuffix(c.APIURL, "/")
	}
	own := c.URL != "" || c.APIURL != ""
	dialer := &net.Dialer{Timeout: within, Control: netaddr.Policy{Loopback: own, Private: own}.Control}
	return &Client{
		oauth: oauth2.Config{
			ClientID: c.ClientID, ClientSecret: c.ClientSecret, RedirectURL: c.Callback, Scopes: []string{"read:user", "user:email"},
			Endpoint: oauth2.Endpoint{AuthURL: site + "/login/oauth/authorize", TokenURL: site + "/login/oauth/access_token", AuthStyle: oauth2.AuthStyleInParams},
		},
		api: api, http: &http.Client{Timeout: within, Transport: &http.Transport{
			DialContext: dialer.DialContext, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: 30 * time.Second,
		}},
	}
}

// AuthorizeURL is where a browser goes. state comes back with it; verifier is
// kept for Identify.
func (c *Client) AuthorizeURL(state, verifier string) string {
	return c.oauth.AuthCodeURL(state, oauth2.S256ChallengeOption(verifier))
}

// Identify changes the code that a browser came back with into who it is of.
func (c *Client) Identify(ctx context.Context, code, verifier string) (Identity, error) {
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, oauth2.HTTPClient, c.http), within)
	defer cancel()
	token, err := c.oauth.Exchange(ctx, code, oauth2.VerifierOption(verifier))
	if err != nil {
		return Identity{}, fmt.Errorf("exchange code: %w", err)
	}
	client := c.oauth.Client(ctx, token)
	var user struct {
		ID int64 `json:"id"`
	}
	if err := get(ctx, client, c.api+"/user", &user); err != nil {
		return Identity{}, err
	}
	var emails []struct {
		Email             string `json:"email"`
		Primary, Verified bool
	}
	if err := get(ctx, client, c.api+"/user/emails?per_page=100", &emails); err != nil {
		return Identity{}, err
	}
	if user.ID <= 0 {
		return Identity{}, errors.New("GitHub does not say whose token it is")
	}
	for _, e := range emails {
		if e.Primary && e.Verified && e.Email != "" {
			return Identity{Subject: strconv.FormatInt(user.ID, 10), Email: e.Email}, nil
		}
	}
	return Identity{}, ErrNoEmail
}

func get(ctx context.Context, client *http.Client, url string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/vnd.github+json")
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask GitHub: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("ask GitHub: %s", res.Status)
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("read GitHub's answer: %w", err)
	}
	return nil
}

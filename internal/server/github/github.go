// Package github authenticates users with GitHub or GitHub Enterprise, by OAuth's
// authorization code flow with PKCE (RFC 6749, RFC 7636).
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

// ErrNoEmail reports an account without a verified primary address.
var ErrNoEmail = errors.New("no verified primary e-mail address on GitHub")

// Config is an OAuth application registered with GitHub.
type Config struct {
	ClientID, ClientSecret string
	// URL is GitHub's site and APIURL its API (https://github.com,
	// https://api.github.com).
	URL, APIURL string
	// Callback is the URL to which GitHub redirects browsers.
	Callback string
}

// Identity is an account on GitHub.
type Identity struct {
	// Subject is GitHub's numeric id of the account.
	Subject string
	// Email is the account's verified primary address.
	Email string
}

// Client calls GitHub.
type Client struct {
	oauth oauth2.Config
	api   string
	http  *http.Client
}

// New returns a client for an application. It calls only public addresses, unless c names
// its own site, which may be on this machine or in a private network. It uses no HTTP
// proxy, because a proxy would resolve names itself.
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

// AuthorizeURL returns the URL to redirect a browser to. GitHub returns state with the
// code. Pass the same verifier to [Client.Identify].
func (c *Client) AuthorizeURL(state, verifier string) string {
	return c.oauth.AuthCodeURL(state, oauth2.S256ChallengeOption(verifier))
}

// Identify exchanges the code that a browser returned with for the account's identity.
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
		return Identity{}, errors.New("GitHub returned no user id")
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
		return fmt.Errorf("call GitHub: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("call GitHub: %s", res.Status)
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("decode GitHub's response: %w", err)
	}
	return nil
}

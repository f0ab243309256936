package guest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/text"
)

const (
	// initAttempt bounds one attempt of [Client.Init]: the longest that the
	// guest takes for what can be asked for, and a busy host.
	initAttempt = 15 * time.Second
	// freezeTimeout bounds [Client.Freeze] and [Client.Thaw]; the guest itself
	// gives up after 5 seconds.
	freezeTimeout = 10 * time.Second
	// settleTimeout bounds [Client.Settle], which writes all that is in the
	// guest's memory and not on its disk.
	settleTimeout = 2 * time.Minute
	// knockTimeout bounds [Client.Knock], for which a request to a port waits.
	knockTimeout = 2 * time.Second
	// entropySize is how many secret bytes a guest gets.
	entropySize = 64
	maxWarnings = 16
)

// Settings make a guest its sandbox's own.
type Settings struct {
	// Token is the access token from now on; empty: it stays.
	Token string
	// Envs is the environment of every process that starts from now on.
	Envs map[string]string
	// User and Workdir are the defaults of requests that name none; empty: they
	// stay.
	User, Workdir string
	// Hostname is the guest's name; empty: it stays.
	Hostname string
	// GrowDisk is how many bytes the guest's disk has by now, when its file
	// system is to fill them; 0: it stays as it is.
	GrowDisk int64
	// Thaw lets users' processes go on, last of all.
	Thaw bool
}

// Report is what the guest says of how [Client.Init] went. It is as
// trustworthy as the guest.
type Report struct {
	// Disk is how many bytes the grown file system has; 0: it was not grown.
	Disk int64
	// Warnings are what did not work and need not keep the sandbox from
	// running: its name, its clock or its disk may not be as they should.
	Warnings []string
}

// Init makes a guest that has booted, or that goes on from captured memory,
// its sandbox's own: see [Settings]; it also gives it secret random bytes and
// the time. No connection from before is used again; the guest closes all that
// it has too, so requests that are under way fail. What must not be lost is
// tried again until ctx ends: a request without an answer, a guest that cannot
// be reached yet. So ctx needs a deadline. After an error the guest may still have the settings,
// Init can be called again.
func (c *Client) Init(ctx context.Context, s Settings) (Report, error) {
	shown := *c.token.Load()
	next := cmp.Or(s.Token, shown)
	m, err := newInitMessage(next, s)
	if err != nil {
		return Report{}, err
	}
	c.transport.CloseIdle()
	attempts := backoff.New(firstPause, lastPause)
	for {
		report, status, err := c.init(ctx, shown, m)
		if err == nil {
			c.token.Store(&next)
			return report, nil
		}
		if status == http.StatusUnauthorized && shown != next {
			shown = next // an answer was lost that said that the guest has it
			continue
		}
		if status != 0 || ctx.Err() != nil {
			return Report{}, err
		}
		if attempts.Wait(ctx) != nil {
			return Report{}, lost(ctx, err)
		}
	}
}

// init makes one attempt; status is 0 when the guest did not answer.
func (c *Client) init(ctx context.Context, token string, m *initMessage) (r Report, status int, err error) {
	attempt, cancel := context.WithTimeout(ctx, initAttempt)
	defer cancel()
	req, err := http.NewRequestWithContext(attempt, http.MethodPost, c.base+"/init", m.reader())
	if err != nil {
		return r, 0, connect.NewError(connect.CodeInternal, fmt.Errorf("make request to the guest: %w", err))
	}
	req.ContentLength = m.size
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(tokenHeader, token)
	resp, err := c.http.Do(req)
	if err != nil {
		return r, 0, lost(ctx, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNoContent:
		return r, resp.StatusCode, nil
	case http.StatusOK:
	default:
		if resp.StatusCode < 400 {
			return r, resp.StatusCode, unreadable(ctx, fmt.Errorf("status %d", resp.StatusCode))
		}
		return r, resp.StatusCode, refusal(resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return r, 0, lost(ctx, err) // half an answer is none
	}
	var said struct {
		Disk     int64
		Warnings []string
	}
	if err := json.Unmarshal(body, &said); err != nil {
		return r, resp.StatusCode, unreadable(ctx, errors.New("a report that is no JSON"))
	}
	r.Disk = said.Disk
	for _, w := range said.Warnings[:min(len(said.Warnings), maxWarnings)] {
		r.Warnings = append(r.Warnings, text.Clean(w, maxError))
	}
	return r, resp.StatusCode, nil
}

// initMessage is the body of /init.
type initMessage struct {
	before, after []byte // of the time
	size          int64
}

// stampFormat is RFC 3339 at one length, so that a body's is known before its time.
const stampFormat = "2006-01-02T15:04:05.000000000Z"

func newInitMessage(token string, s Settings) (*initMessage, error) {
	envs := s.Envs
	if envs == nil {
		envs = map[string]string{}
	}
	entropy := make([]byte, entropySize)
	_, _ = rand.Read(entropy) // never fails
	body, err := json.Marshal(struct {
		AccessToken    string            `json:"accessToken"`
		EnvVars        map[string]string `json:"envVars"`
		DefaultUser    string            `json:"defaultUser,omitempty"`
		DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
		Entropy        []byte            `json:"entropy"`
		Hostname       string            `json:"hostname,omitempty"`
		GrowDisk       int64             `json:"growDisk,omitempty"`
		Thaw           bool              `json:"thaw,omitempty"`
	}{token, envs, s.User, s.Workdir, entropy, s.Hostname, s.GrowDisk, s.Thaw})
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("encode settings: %w", err))
	}
	m := &initMessage{before: []byte(`{"timestamp":"`), after: append([]byte(`",`), body[1:]...)}
	m.size = int64(len(m.before) + len(stampFormat) + len(m.after))
	return m, nil
}

// reader reads the message with the time at which the reading begins: making
// the connection before may have taken long.
func (m *initMessage) reader() io.Reader { return &initReader{m: m} }

type initReader struct {
	m    *initMessage
	rest io.Reader
}

func (r *initReader) Read(p []byte) (int, error) {
	if r.rest == nil {
		now := time.Now().UTC().Format(stampFormat)
		r.rest = io.MultiReader(bytes.NewReader(r.m.before), bytes.NewReader([]byte(now)), bytes.NewReader(r.m.after))
	}
	return r.rest.Read(p)
}

// Freeze makes users' processes stand still and returns when they do; when
// they cannot be made to within 5 seconds they go on, and the error's code is
// deadline_exceeded.
func (c *Client) Freeze(ctx context.Context) error { return c.bid(ctx, "/freeze", freezeTimeout) }

// Thaw lets users' processes go on. That they do already is no error.
func (c *Client) Thaw(ctx context.Context) error { return c.bid(ctx, "/thaw", freezeTimeout) }

// Settle ends users' processes and returns once all that the guest has written
// is on its disk.
func (c *Client) Settle(ctx context.Context) error { return c.bid(ctx, "/settle", settleTimeout) }

// Knock makes the guest daemon look for servers on the guest's loopback, so that new
// ones are reachable at its address. It returns no error, because the daemon also looks
// once a second by itself.
func (c *Client) Knock(ctx context.Context) { _ = c.bid(ctx, "/ports", knockTimeout) }

func (c *Client) bid(ctx context.Context, path string, most time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	resp, err := c.do(ctx, http.MethodPost, path, nil, nil, -1)
	if err != nil {
		return err
	}
	resp.Body.Close()
	return nil
}

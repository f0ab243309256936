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
	"net/url"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/text"
)

const (
	// initAttempt bounds one attempt of [Client.Init]: the longest time that the guest
	// needs for any settings, on a busy host.
	initAttempt = 15 * time.Second
	// freezeTimeout bounds [Client.Freeze] and [Client.Thaw]. The guest itself gives up
	// after 5 seconds.
	freezeTimeout = 10 * time.Second
	// settleTimeout bounds [Client.Settle], which writes all dirty pages to the disk.
	settleTimeout = 2 * time.Minute
	// knockWait is how long [Client.Knock] waits for a server, and knockTimeout bounds it.
	knockWait    = time.Second
	knockTimeout = 3 * time.Second
	// entropySize is the size of a guest's random seed, in bytes.
	entropySize = 64
	maxWarnings = 16
)

// Settings configure a guest for its sandbox. Empty strings change nothing.
type Settings struct {
	// Token is the new access token.
	Token string
	// Envs is the environment of processes that start from now on.
	Envs map[string]string
	// User and Workdir are the defaults for requests without them.
	User, Workdir string
	// Hostname is the guest's host name.
	Hostname string
	// GrowDisk is the size of the guest's disk in bytes, to which the guest grows its file
	// system; 0: it does not.
	GrowDisk int64
	// Debug gives the guest's log, which is on its console, the level debug.
	Debug bool
	// Thaw makes the guest thaw users' processes, after everything else.
	Thaw bool
}

// Report is the guest's report of [Client.Init]. It is only as trustworthy as the guest.
type Report struct {
	// Disk is the size of the grown file system in bytes; 0: the guest did not grow it.
	Disk int64
	// Warnings are errors that need not keep the sandbox from running. They concern its
	// name, its clock or its disk.
	Warnings []string
}

// Init configures a guest after its boot or restore: it applies the settings, seeds the
// guest's random pool and sets its clock. Both sides close their earlier connections, so
// requests in flight fail. Init retries until the guest responds or ctx ends, so ctx needs
// a deadline. After an error, the guest may have the settings. Init is idempotent.
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
			shown = next // the guest has it already: the response to an earlier attempt was lost
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

// init makes one attempt. status is 0 if the guest did not respond.
func (c *Client) init(ctx context.Context, token string, m *initMessage) (r Report, status int, err error) {
	attempt, cancel := context.WithTimeout(ctx, initAttempt)
	defer cancel()
	req, err := http.NewRequestWithContext(attempt, http.MethodPost, c.base+"/init", m.reader())
	if err != nil {
		return r, 0, connect.NewError(connect.CodeInternal, fmt.Errorf("make request to the guest: %w", err))
	}
	req.ContentLength = m.size
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(hostwire.AccessToken, token)
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
		return r, 0, lost(ctx, err)
	}
	var said struct {
		Disk     int64
		Warnings []string
	}
	if err := json.Unmarshal(body, &said); err != nil {
		return r, resp.StatusCode, unreadable(ctx, errors.New("its report is not JSON"))
	}
	r.Disk = said.Disk
	for _, w := range said.Warnings[:min(len(said.Warnings), maxWarnings)] {
		r.Warnings = append(r.Warnings, text.Clean(w, maxError))
	}
	return r, resp.StatusCode, nil
}

// initMessage is the body of /init.
type initMessage struct {
	before, after []byte // the parts around the time
	size          int64
}

// stampFormat is RFC 3339 with a fixed length, so that the body's length is known in
// advance.
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
		Debug          bool              `json:"debug"`
		Thaw           bool              `json:"thaw,omitempty"`
	}{token, envs, s.User, s.Workdir, entropy, s.Hostname, s.GrowDisk, s.Debug, s.Thaw})
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("encode settings: %w", err))
	}
	m := &initMessage{before: []byte(`{"timestamp":"`), after: append([]byte(`",`), body[1:]...)}
	m.size = int64(len(m.before) + len(stampFormat) + len(m.after))
	return m, nil
}

// reader returns a reader of the message with the time of its first Read, which is after
// the connection was made.
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

// Freeze freezes users' processes. If they do not freeze within 5 seconds, the guest thaws
// them, and the error has the code deadline_exceeded.
func (c *Client) Freeze(ctx context.Context) error { return c.post(ctx, "/freeze", freezeTimeout) }

// Thaw thaws users' processes. It is idempotent.
func (c *Client) Thaw(ctx context.Context) error { return c.post(ctx, "/thaw", freezeTimeout) }

// Settle ends users' processes and syncs the guest's disk.
func (c *Client) Settle(ctx context.Context) error { return c.post(ctx, "/settle", settleTimeout) }

// Knock returns whether a server is reachable at a port of the guest's address. It makes
// the guest daemon look for servers on the guest's loopback, and waits a second for one.
// It returns false if the daemon does not answer.
func (c *Client) Knock(ctx context.Context, port uint16) bool {
	ctx, cancel := context.WithTimeout(ctx, knockTimeout)
	defer cancel()
	q := url.Values{"port": {strconv.Itoa(int(port))}, "wait": {knockWait.String()}}
	resp, err := c.do(ctx, http.MethodPost, "/ports", q, nil, -1)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (c *Client) post(ctx context.Context, path string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	resp, err := c.do(ctx, http.MethodPost, path, nil, nil, -1)
	if err != nil {
		return err
	}
	resp.Body.Close()
	return nil
}

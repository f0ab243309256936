package client

import (
	"cmp"
	"context"
	"fmt"
	"net/http"

	"github.com/google/uuid"
)

// Pause saves a sandbox's memory and disk on its host, stops its VM, and returns when
// that is done. Pausing a paused sandbox is not an error.
func (c *Client) Pause(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "pause")
}

// Resume continues a paused sandbox where it was and returns when it runs. Resuming a
// running sandbox is not an error.
func (c *Client) Resume(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "resume")
}

// Reboot restarts a running or paused sandbox from its disk, without its memory, and
// returns when it runs. It also works if the guest does not answer.
func (c *Client) Reboot(ctx context.Context, id string) (*Sandbox, error) {
	return c.turn(ctx, id, "reboot")
}

func (c *Client) turn(ctx context.Context, id, what string) (*Sandbox, error) {
	var s Sandbox
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/"+what), repeatable: true}, &s); err != nil {
		return nil, fmt.Errorf("%s sandbox: %w", what, err)
	}
	return &s, nil
}

// Fork makes count copies of a running sandbox, which keeps running, and returns when
// all of them run; if one fails, none is left. The copies continue from the same
// moment, each with its own id, tokens, host name and random numbers.
func (c *Client) Fork(ctx context.Context, id string, count int) ([]Sandbox, error) {
	body := struct {
		Count int `json:"count"`
	}{count}
	var made struct {
		Sandboxes []Sandbox `json:"sandboxes"`
	}
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/fork"), json: body, repeatable: true, header: once("")}, &made); err != nil {
		return nil, fmt.Errorf("fork sandbox: %w", err)
	}
	return made.Sandboxes, nil
}

// once returns a header with an idempotency key, so that the service recognizes
// retries of the call. An empty key stands for a random one.
func once(key string) http.Header {
	return http.Header{"Idempotency-Key": {cmp.Or(key, uuid.NewString())}}
}

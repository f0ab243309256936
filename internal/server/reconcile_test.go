package server_test

import (
	"context"
	"errors"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// dying restarts the server after it began to delete a sandbox, so that the next one
// finishes the deletion.
func (p *plane) dying(sandbox string, heartbeat time.Duration) {
	p.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		p.Fatal(err)
	}
	p.end()
	p.sql("UPDATE sandboxes SET state = 'stopping' WHERE id = $1", u)
	p.config.Heartbeat = heartbeat
	p.start()
}

// TestDestroyHangs makes the removal of one sandbox hang. The host's other sandbox stays
// usable, because the server still polls the host.
func TestDestroyHangs(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	stuck, other := p.create(map[string]any{"timeout_seconds": 0}), p.create(map[string]any{"timeout_seconds": 0})
	asked, let := make(chan struct{}), make(chan struct{})
	hangs := sync.OnceFunc(func() { close(asked) })
	p.agent.onDestroy = func(ctx context.Context, m *hostagentv1.DestroyRequest) error {
		if m.SandboxId != stuck {
			return nil
		}
		hangs()
		select {
		case <-let:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.dying(stuck, time.Second)
	<-asked
	before := p.agent.called("host")
	// Twice the time after which a silent host is unreachable.
	p.eventually("the server polls the host", func() bool { return p.agent.called("host") >= before+8 })
	p.eventually("the other sandbox is usable", func() bool {
		return p.call("POST", "/v1/sandboxes/"+other+"/exec", map[string]any{"cmd": "cat"}).Status == 200
	})
	if got := p.state(stuck); got != "stopping" {
		t.Errorf("the one being destroyed is %s", got)
	}
	if got := p.metrics(); !regexp.MustCompile(`(?m)^wrenn_reconcile_queue_depth\{host="hst-\w+"\} 1$`).MatchString(got) {
		t.Errorf("/metrics does not count the waiting removal:\n%s", got)
	}
	close(let)
	p.eventually("it has ended", func() bool { return p.state(stuck) == "stopped" })
}

// TestDestroyFails makes the removal of one of nine sandboxes fail. The eight others,
// which the host no longer has, still end.
func TestDestroyFails(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var lost []string
	for range 8 {
		lost = append(lost, p.create(map[string]any{"timeout_seconds": 0}))
	}
	stuck := p.create(map[string]any{"timeout_seconds": 0})
	var works atomic.Bool
	p.agent.onDestroy = func(context.Context, *hostagentv1.DestroyRequest) error {
		if works.Load() {
			return nil
		}
		return connect.NewError(connect.CodeInternal, errors.New("no"))
	}
	for _, sandbox := range lost {
		p.agent.forget(sandbox)
	}
	p.dying(stuck, time.Second)
	for _, sandbox := range lost {
		p.eventually("one that the host lost has ended", func() bool { return p.state(sandbox) == "stopped" })
	}
	if got := p.state(stuck); got != "stopping" {
		t.Errorf("the one that cannot be destroyed is %s", got)
	}
	works.Store(true)
	p.eventually("it has ended", func() bool { return p.state(stuck) == "stopped" })
}

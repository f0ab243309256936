package server_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"
)

// TestDrain drains a host: the server pauses its idle sandboxes, and the next use resumes
// them.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	const beat, idle = 2 * time.Second, 5 * time.Second
	p.config.Heartbeat, p.config.DrainIdle, p.config.AgentURL, p.config.AgentToken = beat, idle, "", ""
	p.start()
	h := p.enroll("a")
	stop := h.beat(p, beat)
	defer func() { stop() }()
	p.eventually("the host is online", func() bool { return p.hostStatus(h.id) == "online" })
	create := func(body map[string]any) string {
		var sandbox string
		p.eventually("the host takes a sandbox", func() bool {
			r := p.call("POST", "/v1/sandboxes", body)
			sandbox, _ = r.object()["id"].(string)
			return r.Status == 201
		})
		return sandbox
	}
	unused, used, ends := create(map[string]any{"timeout_seconds": 0}), create(map[string]any{}), create(map[string]any{"timeout_seconds": 1})
	refuses, mine := create(map[string]any{"timeout_seconds": 0}), create(map[string]any{"timeout_seconds": 0})
	drain := func(is bool) {
		p.call("PATCH", "/v1/admin/hosts/"+h.id, map[string]any{"draining": is}).want(200)
	}
	reconciled := func() { p.compared(h.agent) }

	// The server pauses nothing on a host that does not drain.
	h.unused(unused, time.Hour)
	reconciled()
	if got := p.state(unused); got != "running" {
		t.Fatalf("an idle sandbox of a host that takes sandboxes is %s", got)
	}

	h.unused(used, idle/2)
	h.unused(ends, time.Hour)
	h.unused(mine, time.Hour)
	drain(true)
	for _, sandbox := range []string{unused, ends, mine} {
		p.eventually("it is paused", func() bool { return p.state(sandbox) != "running" && p.state(sandbox) != "pausing" })
	}
	reconciled()
	if got := p.state(used); got != "running" {
		t.Errorf("one that was used lately is %s", got)
	}
	// The next use resumes it, although it has no auto-resume. It is not idle then.
	if row := p.call("GET", "/v1/sandboxes/"+unused, nil).want(200); row.object()["auto_resume"] != false {
		t.Errorf("auto_resume: %s", row.Body)
	}
	h.unused(unused, 0)
	p.call("POST", "/v1/sandboxes/"+unused+"/exec", map[string]any{"cmd": "cat"}).want(200)
	reconciled()
	if got := p.state(unused); got != "running" {
		t.Errorf("after a use it is %s", got)
	}
	// A paused sandbox still ends when its time is over.
	p.eventually("it ends", func() bool { return p.state(ends) == "stopped" })
	if got := p.call("GET", "/v1/sandboxes/"+ends, nil).want(200).str("end_reason"); got != "expired" {
		t.Errorf("its end: %s", got)
	}
	if h.has(ends) {
		t.Error("the host still has it")
	}
	// Nothing but a client resumes a sandbox that a client paused.
	p.call("POST", "/v1/sandboxes/"+mine+"/pause", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+mine+"/exec", map[string]any{"cmd": "cat"}).fails(409, "sandbox_paused")
	p.call("POST", "/v1/sandboxes/"+mine+"/resume", nil).want(200)

	// The host decides in the end whether a sandbox is idle.
	h.hook(func(_ context.Context, call string) error {
		if call == "pause" {
			return connect.NewError(connect.CodeAborted, errors.New("the sandbox is in use"))
		}
		return nil
	})
	before := h.called("pause")
	h.unused(refuses, time.Hour)
	p.eventually("the server tries to pause it", func() bool { return h.called("pause") >= before+2 })
	h.unused(refuses, 0)
	h.hook(nil)
	p.eventually("it runs", func() bool { return p.state(refuses) == "running" })

	// Once the host takes sandboxes again, the server pauses no more.
	drain(false)
	h.unused(used, time.Hour)
	reconciled()
	if got := p.state(used); got != "running" {
		t.Errorf("after the host takes sandboxes again it is %s", got)
	}
}

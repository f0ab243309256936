package server_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// wrong returns the kind and the reason of a sandbox's condition.
func (p *plane) wrong(sandbox string) string {
	c, _ := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).object()["condition"].(map[string]any)
	if c == nil {
		return ""
	}
	if c["message"] == "" || c["since"] == nil {
		p.Errorf("the condition %v", c)
	}
	return c["kind"].(string) + " " + c["reason"].(string)
}

// TestReboot reboots running and paused sandboxes. Concurrent calls share the reboot.
func TestReboot(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	before := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).object()
	g := p.newHold("reboot")
	first := p.later("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil)
	<-g.asked
	if got := p.state(sandbox); got != "resuming" {
		t.Errorf("during the reboot it is %s", got)
	}
	waiting := p.waiting()
	second := p.later("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil)
	p.eventually("the second reboot waits", func() bool { return p.waiting() > waiting })
	g.release <- nil
	for _, answer := range []<-chan response{first, second} {
		r := <-answer
		after := r.want(200).object()
		for _, field := range []string{"id", "team_id", "host_id", "template", "access_token", "traffic_token", "url", "memory_mib", "vcpus", "disk_mib"} {
			if after[field] != before[field] {
				t.Errorf("%s changed from %v to %v", field, before[field], after[field])
			}
		}
		if after["state"] != "running" || after["expires_at"] == nil {
			t.Errorf("it is %v", after)
		}
	}
	if n := p.agent.called("reboot"); n != 1 {
		t.Errorf("it was rebooted %d times", n)
	}
	p.agent.hook(nil)

	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	if got := p.call("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil).want(200).str("state"); got != "running" {
		t.Errorf("a paused one is %s", got)
	}
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil).fails(409, "conflict")
	if got := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("ended_because"); !strings.HasPrefix(got, "killed by key key-") {
		t.Errorf("it ended because %q", got)
	}
}

// TestRebootFails checks that after a failed reboot the server believes the host. The
// next use resumes a sandbox that lost its memory.
func TestRebootFails(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	fail := errors.New("injected")
	p.agent.hook(func(_ context.Context, call string) error {
		if call == "reboot" {
			return connect.NewError(connect.CodeInternal, fail)
		}
		return nil
	})
	p.call("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil).fails(500, "internal")
	if got := p.state(sandbox); got != "running" {
		t.Errorf("one that still runs is %s", got)
	}
	// When the call fails, the host has paused it with its disk alone.
	p.agent.hook(func(_ context.Context, call string) error {
		if call == "reboot" {
			p.agent.condition(sandbox, "reboot")
			return connect.NewError(connect.CodeInternal, fail)
		}
		return nil
	})
	p.call("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil).fails(500, "internal")
	p.agent.hook(nil)
	if got := p.state(sandbox) + " " + p.wrong(sandbox); got != "paused memory_lost reboot" {
		t.Errorf("it is %s", got)
	}
	p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}).want(200)
	if got := p.state(sandbox) + " " + p.wrong(sandbox); got != "running " {
		t.Errorf("after a use it is %s", got)
	}
}

// TestRebootOutlivesServer stops the server during a reboot. The next server records the
// result.
func TestRebootOutlivesServer(t *testing.T) {
	t.Parallel()
	for _, lost := range []bool{false, true} {
		p := newPlane(t)
		sandbox := p.create(map[string]any{})
		p.sql("UPDATE sandboxes SET state = 'resuming', worker = gen_random_uuid() WHERE state = 'running'")
		if lost {
			p.agent.condition(sandbox, "reboot")
			p.agent.mu.Lock()
			p.agent.sandboxes[sandbox].State = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
			p.agent.mu.Unlock()
		}
		want := "running "
		if lost {
			want = "paused memory_lost reboot"
		}
		p.eventually("it is as its host has it", func() bool { return p.state(sandbox)+" "+p.wrong(sandbox) == want })
	}
}

// TestConditions checks that API and audit log show a sandbox's condition and its end.
func TestConditions(t *testing.T) {
	t.Parallel()
	p := newPlaneBeating(t, 2*time.Second)
	sandbox, other := p.create(map[string]any{}), p.create(map[string]any{})
	p.agent.condition(sandbox, "no_answer")
	p.compared(p.agent)
	if got := p.state(sandbox) + " " + p.wrong(sandbox); got != "running unresponsive no_answer" {
		t.Errorf("it is %s", got)
	}
	p.agent.condition(sandbox, "no_space")
	p.compared(p.agent)
	if got := p.wrong(sandbox); got != "unresponsive no_space" {
		t.Errorf("it has %s", got)
	}
	// The server ignores reasons that it does not know or that do not apply to running
	// sandboxes.
	for _, reason := range []string{"from the future", "oom"} {
		p.agent.condition(sandbox, reason)
		p.compared(p.agent)
		if got := p.wrong(sandbox); got != "" {
			t.Errorf("it has %s", got)
		}
	}
	p.agent.condition(sandbox, "no_answer")
	p.compared(p.agent)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/reboot", nil).want(200)
	if got := p.wrong(sandbox) + p.wrong(other); got != "" {
		t.Errorf("after a reboot: %s", got)
	}
	p.agent.condition(other, "no_answer")
	p.compared(p.agent)
	p.agent.condition(other, "")
	p.compared(p.agent)
	if got := p.wrong(other); got != "" {
		t.Errorf("one that responds again has %s", got)
	}
	for _, action := range []string{"sandbox.unresponsive", "sandbox.responsive"} {
		if len(p.audit("action="+action)) == 0 {
			t.Errorf("no audit record of %s", action)
		}
	}
}

// TestMemoryLost checks that a sandbox whose VM died is paused with its disk, whatever
// its auto_resume. The next use boots it; if none comes, it ends with that reason.
func TestMemoryLost(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	used, unused, kept := p.create(map[string]any{}), p.create(map[string]any{}), p.create(map[string]any{"on_timeout": "pause"})
	for _, sandbox := range []string{used, unused, kept} {
		p.agent.condition(sandbox, "oom")
		p.agent.happened(hostagentv1.Event_KIND_PAUSED, sandbox, "its memory is lost")
		p.eventually("it is paused", func() bool { return p.state(sandbox) == "paused" })
		row := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).object()
		if (row["expires_at"] == nil) != (sandbox == kept) || p.wrong(sandbox) != "memory_lost oom" {
			t.Errorf("it is %v", row)
		}
	}
	p.call("POST", "/v1/sandboxes/"+used+"/exec", map[string]any{"cmd": "cat"}).want(200)
	if got := p.state(used) + " " + p.wrong(used); got != "running " {
		t.Errorf("after a use it is %s", got)
	}
	p.sql("UPDATE sandboxes SET expires_at = now() WHERE expires_at IS NOT NULL AND state = 'paused'")
	p.eventually("it has ended", func() bool { return p.state(unused) == "stopped" })
	r := p.call("GET", "/v1/sandboxes/"+unused, nil).want(200)
	if got := r.str("end_reason") + ", " + r.str("ended_because"); got != "oom, oom" || p.wrong(unused) != "" {
		t.Errorf("it ended as %s", r.Body)
	}
	if p.agent.has(unused) {
		t.Error("the host still has it")
	}
	if got := p.state(kept); got != "paused" {
		t.Errorf("one that nothing ends is %s", got)
	}
	for _, action := range []string{"sandbox.memory_lost", "sandbox.oom"} {
		if len(p.audit("action="+action)) == 0 {
			t.Errorf("no audit record of %s", action)
		}
	}
}

// TestEndWords checks that every reason for an end has a text.
func TestEndWords(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	for reason, want := range map[string]string{
		"deleted": "killed by us", "expired": "timeout", "exited": "exited", "oom": "oom", "crashed": "crashed", "restarted": "restarted by itself",
		"killed": "killed by its host", "lost": "lost by its host", "failed": "failed to start",
	} {
		p.sql("UPDATE sandboxes SET end_reason = $1, ended_by = 'us'", reason)
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200)
		if r.str("end_reason") != reason || r.str("ended_because") != want {
			t.Errorf("%s is %q", reason, r.str("ended_because"))
		}
	}
	p.sql("UPDATE sandboxes SET end_reason = 'deleted', ended_by = ''")
	if got := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("ended_because"); got != "deleted" {
		t.Errorf("of an unknown reason it is %q", got)
	}
}

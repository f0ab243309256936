package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// TestSeccomp checks that QEMU has the seccomp filter by default.
func TestSeccomp(t *testing.T) { newHost(t).filters(t, true) }

// TestNoSeccompIsShown checks that the setting turns the seccomp filter off, and that the
// host reports that.
func TestNoSeccompIsShown(t *testing.T) {
	newOwnHost(t, func(h *host) { h.Env["WRENN_NO_SECCOMP"] = "1" }).filters(t, false)
}

// filters checks whether QEMU has the seccomp filter. The host must report a problem if it
// has not.
func (h *host) filters(t *testing.T, want bool) {
	t.Helper()
	sandbox := h.create(t, request())
	var filters int
	for line := range strings.Lines(read(fmt.Sprintf("/proc/%d/status", agenttest.QEMU(sandbox)))) {
		_, _ = fmt.Sscanf(line, "Seccomp_filters:\t%d", &filters)
	}
	if filters == 0 || filters > 1 != want { // one is QEMU's own
		t.Errorf("QEMU has %d filters", filters)
	}
	d, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	shown := slices.ContainsFunc(d.Msg.GetProblems(), func(p *pb.Problem) bool { return p.GetKind() == "jail" })
	if shown == want {
		t.Errorf("the problems are %v", d.Msg.GetProblems())
	}
}

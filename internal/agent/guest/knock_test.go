package guest

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// TestKnock asks a guest daemon, which has an interface of its own, for servers.
func TestKnock(t *testing.T) {
	if os.Getenv(roleEnv) != "inside" {
		t.Skip("needs root: makes a network interface")
	}
	const device = "knock0"
	own := netip.MustParseAddr("169.254.0.21")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = device
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: "knock1"}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(link) })
	address, err := netlink.ParseAddr(own.String() + "/32")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, address); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	c := start(t, "-interface", device)
	listen := func(address string) {
		t.Helper()
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	status := func(port, wait string) (int, error) {
		resp, err := c.do(await.Context(t), http.MethodPost, "/ports", url.Values{"port": {port}, "wait": {wait}}, nil, -1)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}

	listen("127.0.0.1:8001")
	listen("0.0.0.0:8002")
	for _, port := range []string{"8001", "8002"} {
		if code, err := status(port, await.Hang.String()); code != http.StatusOK || err != nil {
			t.Errorf("port %s with a server: %d, %v", port, code, err)
		}
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(own.String(), port), await.Hang)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if code, err := status("8003", "10ms"); code != http.StatusNoContent || err != nil {
		t.Errorf("a port without a server: %d, %v", code, err)
	}
	for _, q := range [][2]string{{"", "1s"}, {"x", "1s"}, {"-1", "1s"}, {"65536", "1s"}, {"8001", ""}, {"8001", "1"}, {"8001", "soon"}} {
		if _, err := status(q[0], q[1]); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("port %q, wait %q: %v", q[0], q[1], err)
		}
	}

	ctx := await.Context(t)
	if !c.Knock(ctx, 8001) {
		t.Error("Knock does not find a server")
	}
	begun := time.Now()
	if c.Knock(ctx, 8003) {
		t.Error("Knock finds a server where there is none")
	}
	if took := time.Since(begun); took < knockWait {
		t.Errorf("Knock waited %v for a server", took)
	}
	// A server that starts while Knock waits, or before it waits again.
	found := make(chan bool)
	go func() {
		for !c.Knock(ctx, 8004) && ctx.Err() == nil {
		}
		found <- ctx.Err() == nil
	}()
	listen("127.0.0.1:8004")
	if !await.Recv(t, "Knock finds the server", found) {
		t.Error("Knock does not find a server that has started")
	}
	gone := New(netip.MustParseAddr("127.255.255.1"), "")
	defer gone.Close()
	if gone.Knock(ctx, 8001) {
		t.Error("Knock finds a server in a guest that does not respond")
	}
}

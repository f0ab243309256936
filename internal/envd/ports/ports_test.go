package ports

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0000000000000000 100 0 0 10 0
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0000000000000000 100 0 0 10 0
   2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1 0000000000000000 100 0 0 10 0
   3: 0100007F:1F91 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 14 1 0000000000000000 100 0 0 10 0
   4: 0100007F:C33F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15 1 0000000000000000 100 0 0 10 0
   5: 1500FEA9:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 16 1 0000000000000000 100 0 0 10 0
`

const table6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:2328 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 21 1 0000000000000000 100 0 0 10 0
   1: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 22 1 0000000000000000 100 0 0 10 0
   2: 0000000000000000FFFF00000200007F:2329 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 23 1 0000000000000000 100 0 0 10 0
   3: 00000000000000000000000000000000:232A 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 24 1 0000000000000000 100 0 0 10 0
   4: 0100007F:232A 00000000:0000 0A bad
   5: zz
`

func TestWanted(t *testing.T) {
	var all []listener
	for _, s := range []string{table, table6} {
		l, err := parse(strings.NewReader(s))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, l...)
	}
	got := fmt.Sprint(wanted(all, []uint16{49983}))
	want := "map[11:127.0.0.1:8080 21:[::1]:9000 23:127.0.0.2:9001 24:[::]:9002] map[80:true 49983:true]"
	if got != want {
		t.Errorf("wanted %s, not %s", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(table)
	f.Add(table6)
	f.Add("0: :0 x 0A a a a a a 1")
	f.Fuzz(func(t *testing.T, s string) {
		l, _ := parse(strings.NewReader(s))
		want, _ := wanted(l, []uint16{1})
		for inode, a := range want {
			if !a.Addr().IsLoopback() && a.Addr() != netip.IPv6Unspecified() || a.Port() <= 1 {
				t.Fatalf("%d leads to %v", inode, a)
			}
		}
	})
}

// own is the guest's address, in the test's own namespace.
var own = netip.MustParseAddr("169.254.0.21")

// inNamespace runs the calling test again in a new network namespace with the guest's
// address, and returns true there.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv("WRENN_TEST_NAMESPACE") == t.Name() {
		for _, args := range [][]string{{"link", "set", "lo", "up"}, {"addr", "add", own.String() + "/32", "dev", "lo"}} {
			if out, err := exec.Command("/sbin/ip", args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v: %s", args, err, out)
			}
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	if _, err := os.Stat("/sbin/ip"); err != nil {
		t.Skip("needs iproute2: ", err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "WRENN_TEST_NAMESPACE="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// echo sends one line back on each connection, until the test ends or closes it.
func echo(t *testing.T, network, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l
}

// answers reports whether an echo comes back, also over a half-closed connection.
func answers(addr string) bool {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return false
	}
	_ = c.(*net.TCPConn).CloseWrite()
	b, err := io.ReadAll(c)
	return err == nil && string(b) == "hello"
}

func TestForward(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := New(Config{Address: own, Except: []uint16{49983}, Log: slog.New(slog.DiscardHandler)})
	done := make(chan struct{})
	go func() { f.Run(ctx); close(done) }()

	four := echo(t, "tcp4", "127.0.0.1:8001")
	echo(t, "tcp4", "0.0.0.0:8002")
	echo(t, "tcp4", "127.0.0.1:49983")
	six := echo(t, "tcp6", "[::1]:8003")
	every := echo(t, "tcp6", "[::]:8004") // IPv6 alone
	echo(t, "tcp", "[::]:8010")           // IPv4 too
	await.Until(t, "bridge to 127.0.0.1", func() bool { return answers("169.254.0.21:8001") })
	await.Until(t, "bridge to ::1", func() bool { return answers("169.254.0.21:8003") })
	await.Until(t, "bridge to ::", func() bool { return answers("169.254.0.21:8004") })
	if !answers("169.254.0.21:8010") {
		t.Error("a service on every address of both families does not respond")
	}
	if answers("169.254.0.21:49983") {
		t.Error("the daemon's own port is bridged")
	}
	if n := len(f.Forwarded()); n != 3 {
		t.Errorf("%d bridges: %v", n, f.Forwarded())
	}
	// An open connection survives until one of its ends closes.
	four.Close()
	six.Close()
	every.Close()
	await.Until(t, "the bridges disappear", func() bool {
		l, err := net.Listen("tcp4", "169.254.0.21:8001")
		if err != nil {
			return false
		}
		l.Close()
		return len(f.Forwarded()) == 0
	})
	// A service that returns is bridged again.
	echo(t, "tcp4", "127.0.0.1:8001")
	await.Until(t, "it is bridged again", func() bool { return answers("169.254.0.21:8001") })

	// A caller that asks for a port need not wait for the next scan.
	for port, address := range map[uint16]string{8001: "127.0.0.1:8001", 8002: "0.0.0.0:8002", 8010: "[::]:8010", 8011: "127.0.0.1:8011", 8012: "[::1]:8012", 8013: "[::]:8013"} {
		if port > 8010 {
			echo(t, "tcp", address)
		}
		if !f.Look(await.Context(t), port) {
			t.Errorf("a scan does not find the server at %s, only %v", address, f.Forwarded())
		}
		dial(t, netip.AddrPortFrom(own, port).String())
	}
	// One that asks for a port without a server waits for it.
	found := make(chan bool, 1)
	go func() { found <- f.Look(await.Context(t), 8014) }()
	f.Look(await.Context(t), 8001)
	select {
	case <-found:
		t.Error("a scan does not wait for a server")
	default:
	}
	echo(t, "tcp4", "127.0.0.1:8014")
	if !await.Recv(t, "the server is found", found) {
		t.Error("a scan does not find a server that was started later")
	}
	dial(t, "169.254.0.21:8014")
	soon, end := context.WithTimeout(ctx, 10*time.Millisecond)
	defer end()
	if f.Look(soon, 8015) {
		t.Error("a scan finds a server where there is none")
	}

	// A port in use on the guest's address gets no bridge.
	echo(t, "tcp4", "169.254.0.21:8005")
	echo(t, "tcp4", "127.0.0.1:8005")
	// When the second of these ports is bridged, a scan has seen that one.
	for _, port := range []string{"8006", "8007"} {
		echo(t, "tcp4", "127.0.0.1:"+port)
		await.Until(t, "a bridge to "+port, func() bool { return answers("169.254.0.21:" + port) })
	}
	await.Until(t, "a service on the guest's own address is bridged", func() bool { return answers("169.254.0.21:8005") })
	cancel()
	<-done
	if answers("169.254.0.21:8001") {
		t.Error("a bridge survived the forwarder")
	}
}

// TestEvents starts servers, which the kernel reports long before the forwarder looks for
// them by itself.
func TestEvents(t *testing.T) {
	const tracefs = "/sys/kernel/tracing"
	if e, err := newEvents(tracefs); err != nil {
		t.Skip("needs tracefs, and the right to use it: ", err)
	} else {
		e.Close()
	}
	if !inNamespace(t) {
		return
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := New(Config{Address: own, Log: slog.New(slog.DiscardHandler), Tracefs: tracefs})
	done := make(chan struct{})
	go func() { f.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	least := time.Hour
	for port := range 5 {
		address := fmt.Sprintf("127.0.0.1:%d", 8001+port)
		begun := time.Now()
		l := echo(t, "tcp4", address)
		await.Until(t, "a bridge", func() bool { return slices.Contains(f.Forwarded(), netip.MustParseAddrPort(address)) })
		l.Close()
		await.Until(t, "no bridge", func() bool { return len(f.Forwarded()) == 0 })
		least = min(least, time.Since(begun))
	}
	if least > retryAfter/2 {
		t.Errorf("the forwarder found out after %v", least)
	}
}

// TestScans checks when the forwarder scans after events, with a clock of its own.
func TestScans(t *testing.T) {
	const port = 80
	run := func(t *testing.T, list func() ([]listener, error)) (f *Forwarder, changed chan struct{}) {
		f = New(Config{Log: slog.New(slog.DiscardHandler)})
		f.list = list
		changed = make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { f.follow(ctx, changed, time.Hour); close(done) }()
		t.Cleanup(func() { cancel(); <-done })
		synctest.Wait()
		return f, changed
	}
	// opens returns a list that has a server from a time on.
	opens := func(after time.Duration) func() ([]listener, error) {
		begun := time.Now()
		return func() ([]listener, error) {
			if time.Since(begun) < after {
				return nil, nil
			}
			return []listener{{inode: 1, addr: netip.AddrPortFrom(netip.IPv4Unspecified(), port)}}, nil
		}
	}
	found := func(t *testing.T, f *Forwarder) time.Duration {
		t.Helper()
		begun := time.Now()
		for time.Since(begun) < time.Minute {
			f.mu.RLock()
			open := f.open[port]
			f.mu.RUnlock()
			if open {
				return time.Since(begun)
			}
			time.Sleep(time.Millisecond)
		}
		t.Fatal("no scan finds the server")
		return 0
	}
	t.Run("an event while a scan is due", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, changed := run(t, opens(scanDelay+time.Microsecond))
			changed <- struct{}{}
			time.Sleep(scanDelay - time.Microsecond)
			go func() { changed <- struct{}{} }() // of the server
			if took := found(t, f); took > 2*scanDelay {
				t.Errorf("a scan found the server after %v", took)
			}
		})
	})
	t.Run("the kernel lists the socket late", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, changed := run(t, opens(lateDelay/2))
			changed <- struct{}{}
			if took := found(t, f); took > lateDelay+2*scanDelay {
				t.Errorf("a scan found the server after %v", took)
			}
		})
	})
	t.Run("events without end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const took, long = 20 * time.Millisecond, time.Minute
			scans := 0
			_, changed := run(t, func() ([]listener, error) {
				scans++
				time.Sleep(took)
				return nil, nil
			})
			for end := time.After(long); ; {
				select {
				case changed <- struct{}{}:
					continue
				case <-end:
				}
				break
			}
			if most := int(long/((1+rest)*took)) + 1; scans > most || scans < most/2 {
				t.Errorf("%d scans that take %v in %v, want at most %d", scans, took, long, most)
			}
		})
	})
}

package ports

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
)

// newBridge listens on address at target's port and forwards connections to target. It
// uses socat, which takes no memory of the daemon, or a relay in the daemon if the image
// has no socat.
func newBridge(address netip.Addr, target netip.AddrPort) (bridge, error) {
	socat, err := exec.LookPath("socat")
	if errors.Is(err, exec.ErrNotFound) {
		return newRelay(address, target)
	}
	if err != nil {
		return nil, fmt.Errorf("find socat: %w", err)
	}
	return newSocat(socat, address, target)
}

type socat struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func newSocat(path string, address netip.Addr, target netip.AddrPort) (*socat, error) {
	cmd := exec.Command(path, socatArgs(address, target)...)
	cmd.Dir = "/"
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start socat: %w", err)
	}
	_ = os.WriteFile("/proc/"+strconv.Itoa(cmd.Process.Pid)+"/oom_score_adj", []byte("0"), 0)
	s := &socat{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = cmd.Wait() // its exit code does not matter
	}()
	return s, nil
}

func socatArgs(address netip.Addr, target netip.AddrPort) []string {
	port := strconv.Itoa(int(target.Port()))
	// socat's default backlog of 5 would lose connections that arrive at the same time.
	listen := "TCP4-LISTEN:" + port + ",bind=" + address.String() + ",backlog=4096,reuseaddr,fork"
	if target.Addr().Is4() {
		return []string{listen, "TCP4:" + target.String()}
	}
	return []string{listen, "TCP6:" + target.String()}
}

func (s *socat) Done() <-chan struct{} { return s.done }

// Stop ends the listening socat and returns when the port is free. The processes that it
// forked end with their connections.
func (s *socat) Stop() {
	_ = s.cmd.Process.Kill()
	<-s.done
}

// relay is the bridge for a guest without socat.
type relay struct {
	l      net.Listener
	target netip.AddrPort
	done   chan struct{}
}

// maxRelayed bounds the open connections of one relay.
const maxRelayed = 1024

func newRelay(address netip.Addr, target netip.AddrPort) (*relay, error) {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(address, target.Port()).String())
	if err != nil {
		return nil, err
	}
	r := &relay{l: l, target: target, done: make(chan struct{})}
	go r.run()
	return r, nil
}

func (r *relay) Done() <-chan struct{} { return r.done }

func (r *relay) Stop() {
	_ = r.l.Close()
	<-r.done
}

func (r *relay) run() {
	defer close(r.done)
	defer r.l.Close()
	room := make(chan struct{}, maxRelayed)
	for {
		c, err := r.l.Accept()
		if err != nil {
			return
		}
		select {
		case room <- struct{}{}:
			go func() {
				defer func() { <-room }()
				r.carry(c.(*net.TCPConn))
			}()
		default:
			c.Close()
		}
	}
}

func (r *relay) carry(in *net.TCPConn) {
	defer in.Close()
	out, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(r.target))
	if err != nil {
		return
	}
	defer out.Close()
	var both sync.WaitGroup
	pass := func(to, from *net.TCPConn) {
		_, err := io.Copy(to, from)
		if err != nil {
			// If one side is gone, the other must not wait for it.
			in.Close()
			out.Close()
			return
		}
		_ = to.CloseWrite()
	}
	both.Go(func() { pass(out, in) })
	both.Go(func() { pass(in, out) })
	both.Wait()
}

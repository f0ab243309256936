package up

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/logging"
	"github.com/wrenn-dev/wrenn/internal/programs"
	"github.com/wrenn-dev/wrenn/internal/settings"
)

// caddyID is the user and group that Caddy runs as; nothing else uses it.
const caddyID = 1_999_998

// frontDoor runs Caddy. This process opens the listening sockets before anything starts
// and keeps them open, so that no other program can take the port.
type frontDoor struct {
	caddy  programs.Program
	binary *os.File // of caddy
	config string
	home   string
	user   account
	env    []string
	listen string
	files  []*os.File // the listening sockets
	// placeholder answers until Caddy starts, and writes to log.
	placeholder *placeholder
	log         *logFile
}

// newFrontDoor listens on the address listen, starts a placeholder there, and writes
// Caddy's configuration. server has the server's settings.
func newFrontDoor(ctx context.Context, dir layout.Dir, listen string, server settings.Values) (_ *frontDoor, err error) {
	f := &frontDoor{config: filepath.Join(dir.Run(), "Caddyfile"), home: filepath.Join(dir.Run(), "caddy"), listen: listen, user: account{caddyID, caddyID}}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	if f.caddy, err = programs.FindCaddy(ctx); err != nil {
		return nil, err
	}
	// Caddy's user may have no access to the folder of the binary, so it gets a descriptor.
	if f.binary, err = os.Open(f.caddy.File); err != nil {
		return nil, fmt.Errorf("open Caddy: %w", err)
	}
	_, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("--listen: %w", err)
	}
	if f.files, err = bind(ctx, listen); err != nil {
		return nil, err
	}
	var format logging.Settings
	if err = server.Parse(&format); err != nil {
		return nil, err
	}
	if f.log, err = openLog(filepath.Join(dir.Logs(), "front-door.log")); err != nil {
		return nil, err
	}
	if f.placeholder, err = newPlaceholder(f.files, logging.New(f.log, format).Logger); err != nil {
		return nil, err
	}
	if err := f.user.ownDir(f.home); err != nil {
		return nil, fmt.Errorf("set up Caddy: %w", err)
	}
	if err := os.WriteFile(f.config, deploy.Caddyfile, 0o644); err != nil {
		return nil, fmt.Errorf("set up Caddy: %w", err)
	}
	var sockets []string
	for i := range f.files {
		sockets = append(sockets, fmt.Sprintf("fd/%d", firstFD+i))
	}
	f.env = []string{
		"XDG_DATA_HOME=" + f.home, "XDG_CONFIG_HOME=" + f.home,
		"WRENN_SITES=http://:" + port, "WRENN_BIND=" + strings.Join(sockets, " "), "WRENN_DOMAIN=" + domain, "WRENN_SERVER=unix/" + dir.ServerSocket(),
	}
	for _, name := range []string{sandboxDomain, trustedProxies} {
		if v := server[name]; v != "" {
			f.env = append(f.env, name+"="+v)
		}
	}
	return f, nil
}

// firstFD is the descriptor of the first file in [exec.Cmd.ExtraFiles].
const firstFD = 3

// bind listens on every address that listen names. It fails if another program
// answers at one of the addresses that clients will try.
func bind(ctx context.Context, listen string) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			files = nil
		}
	}()
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("--listen: %w", err)
	}
	hosts := []string{host}
	if host != "" && net.ParseIP(host) == nil {
		if hosts, err = net.DefaultResolver.LookupHost(ctx, host); err != nil {
			return nil, fmt.Errorf("--listen: %w", err)
		}
	}
	var lc net.ListenConfig
	mine := make(map[string]bool)
	for _, host := range hosts {
		address := net.JoinHostPort(host, port)
		if mine[address] {
			continue
		}
		mine[address] = true
		l, err := lc.Listen(ctx, "tcp", address)
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			return files, inUse(address)
		case errors.Is(err, syscall.EADDRNOTAVAIL) && len(hosts) > 1:
			continue // A name can have an address of a family that is turned off.
		case err != nil:
			return files, fmt.Errorf("--listen: %w", err)
		}
		f, err := l.(*net.TCPListener).File()
		if err = errors.Join(err, l.Close()); err != nil {
			return files, fmt.Errorf("--listen: %w", err)
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("--listen: %s has no address on this machine", listen)
	}
	return files, nobodyElse(ctx, listen, files)
}

// checkListen returns an error for an address that other machines may reach, because
// plain HTTP shows passwords and keys to everybody on the network.
func checkListen(ctx context.Context, o options) error {
	host, _, err := net.SplitHostPort(o.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	if o.insecure {
		return nil
	}
	addresses := []string{host}
	if host != "" && net.ParseIP(host) == nil {
		if addresses, err = net.DefaultResolver.LookupHost(ctx, host); err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
	}
	for _, a := range addresses {
		if ip := net.ParseIP(a); ip == nil || !ip.IsLoopback() {
			return fmt.Errorf("--listen %s: other machines can reach this address, and would send passwords and keys in clear text. Put a front door with HTTPS in front of localhost (README, Add a machine), or add --insecure on a network that you trust", o.listen)
		}
	}
	return nil
}

func inUse(address string) error {
	return fmt.Errorf("%s is in use by another program: choose another address with --listen", address)
}

// nobodyElse returns an error if the public URL says localhost and another program
// listens on this port at a loopback address that files do not cover.
func nobodyElse(ctx context.Context, listen string, files []*os.File) error {
	_, port, _ := net.SplitHostPort(listen)
	if publicURL(listen) != publicURL(net.JoinHostPort("localhost", port)) {
		return nil
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		address := net.JoinHostPort(host, port)
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", address)
		if err == nil {
			_ = l.Close()
			continue
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			continue // This machine has no such address.
		}
		if !covered(net.ParseIP(host), files) {
			return inUse(address)
		}
	}
	return nil
}

// covered reports whether one of files, which are listening sockets, listens at ip.
func covered(ip net.IP, files []*os.File) bool {
	for _, f := range files {
		l, err := net.FileListener(f)
		if err != nil {
			continue
		}
		a := l.Addr().(*net.TCPAddr)
		_ = l.Close()
		// The IPv6 wildcard also accepts IPv4; the IPv4 wildcard does not accept IPv6.
		if a.IP.Equal(ip) || a.IP.IsUnspecified() && (a.IP.To4() == nil || ip.To4() != nil) {
			return true
		}
	}
	return false
}

// close closes the sockets. Caddy must have exited.
func (f *frontDoor) close() {
	if f.placeholder != nil {
		f.placeholder.close()
	}
	if f.log != nil {
		_ = f.log.Close()
	}
	for _, l := range f.files {
		_ = l.Close()
	}
	if f.binary != nil {
		_ = f.binary.Close()
	}
}

func (f *frontDoor) program() program {
	return program{
		name: "Caddy",
		command: func() *exec.Cmd {
			f.placeholder.leave()
			cmd := f.caddy.Command("run", "--config", f.config, "--adapter", "caddyfile")
			cmd.ExtraFiles = append(slices.Clone(f.files), f.binary)
			cmd.Path = fmt.Sprintf("/proc/self/fd/%d", firstFD+len(f.files))
			f.user.run(cmd, f.home)
			cmd.Env = append(cmd.Env, f.env...)
			return cmd
		},
		// The socket accepts connections before Caddy runs, so only an answer shows that it does.
		ready: func(ctx context.Context) error { return poll(ctx, f.answers) },
		quit:  syscall.SIGTERM,
	}
}

// answers returns nil if Caddy answers, with any status.
func (f *frontDoor) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, "http://"+dialable(f.listen)+"/", nil)
	if err != nil {
		return err
	}
	t := http.Transport{DisableKeepAlives: true}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// dialable returns an address at which this machine reaches a listener on addr.
func dialable(addr string) string {
	host, port, _ := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// publicURL returns the URL that users type for an address.
func publicURL(listen string) string {
	host, port, _ := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); host == "" || ip != nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		host = "localhost"
	}
	if port == "80" {
		return "http://" + host
	}
	return "http://" + net.JoinHostPort(host, port)
}

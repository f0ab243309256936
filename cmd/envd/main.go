// Command envd is Wrenn's guest daemon.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd"
	"github.com/wrenn-dev/wrenn/internal/envd/boot"
	"github.com/wrenn-dev/wrenn/internal/envd/machine"
	"github.com/wrenn-dev/wrenn/internal/envd/modprobe"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

func main() {
	boot.Main()
	modprobe.Main()
	listen := flag.String("listen", ":"+strconv.Itoa(hostwire.GuestPort), "address to listen on: host:port or unix:/path")
	user := flag.String("user", "user", "user for requests that name none")
	group := flag.String("cgroup", defaultCgroup(), "cgroup2 directory for users' processes; empty for none")
	device := flag.String("interface", "eth0", "network interface at whose address to publish services that listen on loopback; empty for none")
	whole := flag.Bool("guest", false, "manage the machine: set its host name and clock, reseed its random pool and grow its disk when asked")
	flag.Parse()

	// Files that users' processes create have the usual permissions.
	unix.Umask(0o022)
	// Users' processes must not inherit what envd's parent left open.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	// If memory runs out, envd must survive to report it.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)

	level := new(slog.LevelVar)
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	cfg := envd.Config{DefaultUser: *user, Cgroup: *group, Log: log, Level: level}
	if *whole {
		cfg.Machine, cfg.Clock, cfg.Tracefs = machine.New(), boot.ClockCgroup, boot.Tracefs
	}
	if err := run(ctx, cfg, *listen, *device); err != nil {
		log.Error("envd", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, cfg envd.Config, listen, device string) error {
	if device != "" {
		var err error
		if cfg.Address, err = addressOf(device); err != nil {
			cfg.Log.Warn("cannot publish services that listen on loopback", "error", err)
		}
	}
	s, err := envd.New(cfg)
	if err != nil {
		return err
	}
	return s.Run(ctx, listen)
}

// defaultCgroup returns the directory wrenn-user where cgroup2 is mounted, alone or beside
// version 1.
func defaultCgroup() string {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return filepath.Join(dir, "wrenn-user")
		}
	}
	return ""
}

// addressOf returns the first IPv4 address of a network interface.
func addressOf(device string) (netip.Addr, error) {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find interface %s: %w", device, err)
	}
	addrs, err := i.Addrs()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find address of %s: %w", device, err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("interface %s has no IPv4 address", device)
}

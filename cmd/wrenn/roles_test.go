package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caarlos0/env/v11"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/graceful"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// TestCAInit creates an authority that a server accepts, and never overwrites one.
func TestCAInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	run := func() (string, error) {
		var out strings.Builder
		cmd := caCommand(&out)
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs([]string{"init", "--dir", dir})
		err := cmd.Execute()
		return out.String(), err
	}
	said, err := run()
	if err != nil {
		t.Fatal(err)
	}
	cert, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	if said != "WRENN_CA_CERT="+cert+"\nWRENN_CA_KEY="+key+"\n" {
		t.Errorf("it printed %q", said)
	}
	if _, err := pki.LoadAuthority(cert, key); err != nil {
		t.Error(err)
	}
	for _, path := range []string{cert, key} {
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	before, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run(); err == nil {
		t.Error("it overwrote the authority")
	}
	if after, err := os.ReadFile(key); err != nil || string(after) != string(before) {
		t.Errorf("the key has changed: %v", err)
	}
}

// TestAgentListensAtHome checks that without certificates an agent listens on loopback
// only, and refuses anything else before it registers or writes anything.
func TestAgentListensAtHome(t *testing.T) {
	asked := 0
	control := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer control.Close()
	for _, listen := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:7070", "[2001:db8::1]:7070", "host.example:7070", ""} {
		for _, e := range []all.Enrollment{
			{},
			{Server: control.URL, HostToken: "wrnh_x", URL: "http://127.0.0.1:7070"},
			{Server: control.URL, HostToken: "wrnh_x", URL: "unix:/run/wrenn.sock"},
		} {
			dir := filepath.Join(t.TempDir(), "data")
			err := runAgent(context.Background(), agent.Config{Dir: layout.Dir(dir), Listen: listen}, e)
			if err == nil || listen != "" && !strings.Contains(err.Error(), "this machine") {
				t.Errorf("listening on %q, called at %q: %v", listen, e.URL, err)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("listening on %q, called at %q: it wrote something", listen, e.URL)
			}
		}
	}
	if asked != 0 {
		t.Errorf("the control plane got %d requests", asked)
	}
}

// TestUnitsWait checks that systemd waits as long for a stopping program as its stop may
// take.
func TestUnitsWait(t *testing.T) {
	c, err := env.ParseAsWithOptions[server.Config](env.Options{Environment: map[string]string{"DATABASE_URL": "x", "REDIS_URL": "x", "WRENN_SECRET_KEY": "x"}})
	if err != nil {
		t.Fatal(err)
	}
	const rest = 6 * time.Second // the last writes to Redis and PostgreSQL, and the last traces
	for unit, takes := range map[string]time.Duration{"server": graceful.InFlight + c.StopTimeout + rest, "agent": graceful.InFlight + agent.CloseTimeout + rest} {
		text, err := os.ReadFile("../../deploy/systemd/wrenn-" + unit + ".service")
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`(?m)^TimeoutStopSec=(\d+)$`).FindSubmatch(text)
		if found == nil {
			t.Fatalf("the unit of the %s does not say how long a stop may take", unit)
		}
		if allowed := string(found[1]) + "s"; takes > duration(t, allowed) {
			t.Errorf("systemd kills the %s after %s, and it may take %v", unit, allowed, takes)
		}
	}
	if c.StopTimeout < time.Minute {
		t.Errorf("creations have %v to finish", c.StopTimeout)
	}
}

func duration(t *testing.T, text string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMetricsListener checks that metrics are served on their own listener, and only while
// the program runs.
func TestMetricsListener(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "m.sock")
	metrics := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) })
	bound := func(l net.Listener) net.Listener { return l }
	get := func() (string, error) {
		c := &http.Client{Transport: netaddr.Transport(addr, false)}
		defer c.CloseIdleConnections()
		resp, err := c.Get("http://wrenn/metrics")
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	ran := false
	run := func(context.Context) error { ran = true; return nil }
	if err := withMetrics("", bound, metrics, run)(t.Context()); err != nil || !ran {
		t.Errorf("without a listener: it ran: %v, %v", ran, err)
	}
	err := withMetrics(addr, bound, metrics, func(context.Context) error {
		if got, err := get(); err != nil || got != "/metrics" {
			t.Errorf("got %q, %v", got, err)
		}
		return errors.New("ended")
	})(t.Context())
	if err == nil || err.Error() != "ended" {
		t.Errorf("it returned %v", err)
	}
	if _, err := get(); err == nil {
		t.Error("the listener is still open")
	}
}

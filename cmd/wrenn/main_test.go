package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caarlos0/env/v11"
	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// TestNewerDataStopsOnce checks that systemd does not restart an agent or a server that
// stopped because a later release wrote its data.
func TestNewerDataStopsOnce(t *testing.T) {
	for _, err := range []error{&format.NewerError{}, &store.NewerError{}} {
		if got := exitCode(fmt.Errorf("start: %w", errors.Join(err, errors.New("more")))); got != exitNewer {
			t.Errorf("exit code %d for %T", got, err)
		}
	}
	if got := exitCode(errors.New("other")); got == exitNewer || got == 0 {
		t.Errorf("exit code %d for another error", got)
	}
	for _, unit := range []string{"wrenn-agent.service", "wrenn-server.service"} {
		text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "systemd", unit))
		if err != nil || !strings.Contains(string(text), fmt.Sprintf("\nRestartPreventExitStatus=%d\n", exitNewer)) {
			t.Errorf("%s: %v", unit, err)
		}
	}
}

// TestAgentOnNewerData checks that the agent reports newer data before it calls the
// control plane.
func TestAgentOnNewerData(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if err := os.WriteFile(dir.Events(), []byte("wrnjrnl2"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, e := range []all.Enrollment{{}, {Server: "http://127.0.0.1:1", HostToken: "wrnh_x", URL: "http://127.0.0.1:7070"}} {
		c := agent.Config{Dir: dir, Listen: "127.0.0.1:0", Token: "token", Log: slog.New(slog.DiscardHandler)}
		if err := runAgent(context.Background(), c, e); exitCode(err) != exitNewer {
			t.Errorf("the error is %v", err)
		}
	}
}

// TestUnitAllowsForTheMemory checks that the server's unit allows twice the memory that
// the server limits itself to.
func TestUnitAllowsForTheMemory(t *testing.T) {
	c, err := env.ParseAsWithOptions[server.Config](env.Options{Environment: map[string]string{"DATABASE_URL": "x", "REDIS_URL": "x", "WRENN_SECRET_KEY": "x"}})
	if err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("../../deploy/systemd/wrenn-server.service")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("\nMemoryMax=%dG\n", 2*c.MemoryLimit()>>30); !strings.Contains(string(unit), want) {
		t.Errorf("the unit lacks %q", want)
	}
}

// TestClientsWarn checks that a client command warns about a misspelled setting, and about
// nothing else in its environment.
func TestClientsWarn(t *testing.T) {
	t.Setenv("WRENN_ULR", "https://wrenn.example.com")
	t.Setenv("WRENN_SOMETHING_ELSE", "x")
	t.Setenv("WRENN_URL", "http://127.0.0.1:1")
	t.Setenv("WRENN_API_KEY", "wrn_x")
	var out, errw strings.Builder
	root := &cobra.Command{Use: "wrenn", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(clientCommands(strings.NewReader(""), &out, &errw)...)
	root.SetArgs([]string{"key", "current"})
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	if want := "wrenn: warning: WRENN_ULR is not a setting: did you mean WRENN_URL?\n"; errw.String() != want || out.String() != "wrn_x\n" {
		t.Errorf("it printed %q and %q, want %q", out.String(), errw.String(), want)
	}
}

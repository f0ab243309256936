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

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// TestNewerDataStopsOnce: systemd does not start an agent or a server again
// that stopped because a later release wrote its data.
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

// TestAgentOnNewerData: it says so before it calls the control plane.
func TestAgentOnNewerData(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if err := os.WriteFile(dir.Events(), []byte("wrnjrnl2"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, e := range []enrollment{{}, {Server: "http://127.0.0.1:1", Token: "wrnh_x", URL: "http://127.0.0.1:7070"}} {
		c := agent.Config{Dir: dir, Listen: "127.0.0.1:0", Token: "token", Log: slog.New(slog.DiscardHandler)}
		if err := runAgent(context.Background(), c, e); exitCode(err) != exitNewer {
			t.Errorf("the error is %v", err)
		}
	}
}

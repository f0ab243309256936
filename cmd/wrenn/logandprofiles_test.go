package main

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/logging"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// TestHangupReloadsTheLog checks that on SIGHUP the log follows the settings file, but
// not one with an error.
func TestHangupReloadsTheLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "wrenn.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("server:\n  log_level: debug\n")
	t.Setenv(settings.FileVariable, file)
	log, stop := openLog(all.ServerProgram, logging.Settings{Level: slog.LevelWarn}, nil)
	defer stop()
	enabled := func(level slog.Level) bool { return log.Enabled(context.Background(), level) }
	if enabled(slog.LevelInfo) {
		t.Error("it logs more than the level allows")
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the log follows the file", func() bool { return enabled(slog.LevelDebug) })
	for _, wrong := range []string{"server: [", "server:\n  log_level: loud\n"} {
		write(wrong)
		if reload(all.ServerProgram, log); !enabled(slog.LevelDebug) {
			t.Errorf("%q changed the level", wrong)
		}
	}
}

// TestHelpHasSettings checks that --help prints the settings of the program, which
// TestHelp in internal/settings/all compares with docs/configuration.md.
func TestHelpHasSettings(t *testing.T) {
	for _, p := range []settings.Program{all.ServerProgram, all.AgentProgram} {
		var printed strings.Builder
		root := rootCommand()
		root.SetOut(&printed)
		root.SetArgs([]string{p.Name, "--help"})
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		if len(p.Settings) < 20 || !strings.Contains(printed.String(), p.Help()) {
			t.Errorf("wrenn %s --help prints\n%s", p.Name, printed.String())
		}
	}
}

// TestProfiles checks that only a Unix socket of the program's user serves profiles.
func TestProfiles(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "debug.sock")
	ran := false
	err := withProfiles(t.Context(), all.Operation{DebugListen: "unix:" + socket}, func(ctx context.Context) error {
		ran = true
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket: %v, %v", info.Mode(), err)
		}
		c, base := netaddr.HTTPClient("unix:" + socket)
		defer c.CloseIdleConnections()
		for path, want := range map[string]string{"goroutine?debug=1": "goroutine profile: total ", "": "heap", "cmdline": os.Args[0]} {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/debug/pprof/"+path, nil)
			if err != nil {
				return err
			}
			resp, err := c.Do(req)
			if err != nil {
				return err
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), want) {
				t.Errorf("%s: %d, %v, %.200s", path, resp.StatusCode, err, b)
			}
		}
		return nil
	})
	if err != nil || !ran {
		t.Errorf("%v, ran: %v", err, ran)
	}
	for _, listen := range []string{"127.0.0.1:0", "localhost:0", ":0"} {
		err := withProfiles(t.Context(), all.Operation{DebugListen: listen}, func(context.Context) error {
			t.Errorf("ran with profiles at %s", listen)
			return nil
		})
		if err == nil {
			t.Errorf("listens at %s", listen)
		}
	}
}

package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/wrenn-dev/wrenn/internal/logging"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// openLog returns the log of a program. Until stop is called, each SIGHUP sets its level
// and format from the settings file again.
func openLog(p settings.Program, s logging.Settings, warnings []string) (log *logging.Log, stop func()) {
	log = logging.New(os.Stderr, s)
	for _, w := range warnings {
		log.Warn(w)
	}
	hangups, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(hangups, syscall.SIGHUP)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-hangups:
				reload(p, log)
			case <-done:
				return
			}
		}
	})
	return log, func() {
		signal.Stop(hangups)
		close(done)
		wg.Wait()
	}
}

// reload sets the log's level and format from the present settings. If it cannot read
// them, it changes nothing.
func reload(p settings.Program, log *logging.Log) {
	var s logging.Settings
	values, _, err := p.Read(os.Environ())
	if err == nil {
		err = values.Parse(&s)
	}
	if err != nil {
		log.Error("the log keeps its level and format", "error", err)
		return
	}
	log.Set(s)
	log.Info("read the log's settings again", "log_level", s.Level, "log_format", s.Format)
}

// withProfiles calls run. If o.DebugListen is set, it serves pprof until run returns, on
// a Unix socket that only this program's user and root can open.
func withProfiles(ctx context.Context, o all.Operation, run func(context.Context) error) error {
	if o.DebugListen == "" {
		return run(ctx)
	}
	if network, _ := netaddr.Split(o.DebugListen); network != "unix" {
		return fmt.Errorf("WRENN_DEBUG_LISTEN is %s: profiles show secrets that are in memory, so it must be unix:/path", o.DebugListen)
	}
	return serve(ctx, o.DebugListen, nil, nil, profiles(), nil, run)
}

func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// Package envd is the guest daemon. For clients with the sandbox's token it runs
// processes, moves files and reports metrics.
package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/cgroup"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/envd/files"
	"github.com/wrenn-dev/wrenn/internal/envd/filesystem"
	"github.com/wrenn-dev/wrenn/internal/envd/metrics"
	"github.com/wrenn-dev/wrenn/internal/envd/ports"
	"github.com/wrenn-dev/wrenn/internal/envd/process"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Config configures the daemon. Only DefaultUser is required.
type Config struct {
	// DefaultUser is the user of requests that name none.
	DefaultUser string
	// Cgroup is the cgroup2 directory for users' processes, which New creates (empty: none;
	// then processes cannot be frozen).
	Cgroup string
	// Clock is the cgroup2 directory of chronyd, which the server freezes together with
	// users' processes (empty: none).
	Clock string
	// Address is the guest's address, at which the server publishes services that listen
	// only on loopback (invalid: it does not).
	Address netip.Addr
	// Tracefs is where that file system is mounted. With it, the server publishes such
	// services when they begin to listen (empty: within a second).
	Tracefs string
	// Machine is the machine that /init changes (nil: /init ignores what concerns the
	// machine).
	Machine Machine
	Log     *slog.Logger
	// Level is the level of Log, which /init sets (nil: /init leaves it alone).
	Level *slog.LevelVar
}

// Machine changes what identifies a guest after a restore. The package machine has the
// real implementation.
type Machine interface {
	// Reseed makes the kernel's random numbers independent of those of other machines with
	// the same memory.
	Reseed(secret []byte) error
	Rename(hostname string) error
	// Export gives the sandbox's variables to processes that the daemon does not start.
	Export(envs map[string]string) error
	// SetClock corrects the clock. host is the host's time when it sent the request.
	SetClock(host time.Time) error
	// Grow grows the root file system to the size of its device, which is bytes, and
	// returns its size in bytes.
	Grow(ctx context.Context, bytes int64) (int64, error)
}

// Server is the daemon.
type Server struct {
	cfg        Config
	log        *slog.Logger
	tree       *cgroup.Tree     // nil: no cgroups
	clock      *cgroup.Tree     // nil: chronyd is not frozen
	ports      *ports.Forwarder // nil: services on loopback are not published
	processes  *process.Service
	filesystem *filesystem.Service
	handler    http.Handler
	open       connections

	initialising sync.Mutex // held by /init

	mu    sync.RWMutex
	state state
}

// state is what /init has set.
type state struct {
	token   string // empty: not initialised
	envs    map[string]string
	user    string
	workdir string
}

// New returns a daemon that only serves /health and /init until it is initialised.
func New(cfg Config) (*Server, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: log, state: state{user: cfg.DefaultUser}}
	if cfg.Cgroup != "" {
		tree, err := cgroup.Open(cfg.Cgroup)
		if err != nil {
			// Processes run without cgroups, too, but a kill misses those that leave their group.
			log.Warn("no cgroup for users' processes", "error", err)
		} else {
			s.tree = tree
		}
	}
	if cfg.Clock != "" && s.tree != nil {
		clock, err := cgroup.Open(cfg.Clock)
		if err != nil {
			log.Warn("no cgroup for the clock", "error", err)
		} else {
			s.clock = clock
		}
	}
	s.processes = process.New(process.Config{Tree: s.tree, Log: log, Defaults: func() process.Defaults {
		st := s.current()
		return process.Defaults{Envs: st.envs, Workdir: st.workdir}
	}})
	s.filesystem = filesystem.New()
	if cfg.Address.IsValid() {
		s.ports = ports.New(ports.Config{Address: cfg.Address, Except: []uint16{hostwire.GuestPort}, Log: log, Tracefs: cfg.Tracefs})
	}

	// These requests run with the rights of a user.
	user := http.NewServeMux()
	// Requests may be compressed. Responses stay on the host, so compressing them would only
	// cost the guest time.
	plain := connect.WithCompressMinBytes(1 << 30)
	logged := connect.WithInterceptors(calls{log})
	user.Handle(s.processes.Handler(plain, logged))
	user.Handle(s.filesystem.Handler(plain, logged))
	files.Register(user)

	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /init", s.init)
	mux.Handle("GET /metrics", s.guard(metrics.NewReader()))
	mux.Handle("GET /envs", s.guard(http.HandlerFunc(s.envs)))
	mux.Handle("POST /freeze", s.guard(s.toTree(s.freeze)))
	mux.Handle("POST /settle", s.guard(s.toTree(s.settle)))
	mux.Handle("POST /ports", s.guard(http.HandlerFunc(s.look)))
	mux.Handle("POST /thaw", s.guard(s.toTree(s.thaw)))
	mux.Handle("/", s.guard(s.identify(user)))
	s.handler = timed(requests{log, mux})
	return s, nil
}

// Handler returns the handler of the daemon's whole interface.
func (s *Server) Handler() http.Handler { return s.handler }

// Run serves at addr ("host:port" or "unix:/path") until ctx is done, then ends users'
// processes and returns. Call it only once.
func (s *Server) Run(ctx context.Context, addr string) error {
	l, err := netaddr.Listen(ctx, addr, 0o600)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	srv := netaddr.Server(s.handler)
	s.open.track(srv)
	srv.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)
	// Pings detect a peer that disappeared, for example because its host failed or this
	// guest was moved.
	srv.HTTP2.SendPingTimeout, srv.HTTP2.PingTimeout = 30*time.Second, 15*time.Second

	var background sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	if s.ports != nil {
		background.Go(func() { s.ports.Run(ctx) })
	}
	background.Go(func() {
		<-ctx.Done()
		end, done := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
		defer done()
		// Ending the processes ends their streams.
		s.Close(end)
		if srv.Shutdown(end) != nil {
			_ = srv.Close()
		}
	})
	err = srv.Serve(l)
	cancel()
	background.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

// Close ends users' processes and watchers. Run calls it.
func (s *Server) Close(ctx context.Context) {
	if err := s.processes.Close(ctx); err != nil {
		s.log.Warn("end users' processes", "error", err)
	}
	s.filesystem.Close()
	if s.tree != nil {
		if err := s.tree.Close(ctx); err != nil {
			s.log.Warn("remove cgroups", "error", err)
		}
	}
}

func (s *Server) current() state {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.state
}

func (s *Server) envs(w http.ResponseWriter, _ *http.Request) {
	envs := s.current().envs
	if envs == nil {
		envs = map[string]string{}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(envs)
}

// maxLook bounds how long a request of /ports may wait.
const maxLook = 5 * time.Second

// look serves /ports: it waits until a server is reachable at a port of the guest's address,
// for the time that the caller asks for. The status is 200 if there is one, and 204 if not.
func (s *Server) look(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	var wait time.Duration
	if err == nil {
		wait, err = time.ParseDuration(q.Get("wait"))
	}
	if err != nil {
		fault.Write(w, http.StatusBadRequest, connect.CodeInvalidArgument, "port must be a port number, and wait a duration")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), min(wait, maxLook))
	defer cancel()
	status := http.StatusNoContent
	if s.ports != nil && s.ports.Look(ctx, uint16(port)) {
		status = http.StatusOK
	}
	w.WriteHeader(status)
}

// freezeLimit is how long users' processes may take to freeze.
const freezeLimit = 5 * time.Second

// toTree returns a handler that calls do, with the timeout freezeLimit, if users'
// processes are in cgroups.
func (s *Server) toTree(do func(context.Context) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.tree == nil {
			fault.Write(w, http.StatusNotImplemented, connect.CodeUnimplemented, "this guest has no cgroup2 to freeze processes with")
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), freezeLimit)
		defer cancel()
		if err := do(ctx); err != nil {
			fault.WriteError(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
}

// freeze freezes users' processes and chronyd. Otherwise chronyd would measure between a
// restore and /init how far the clock is behind, and would correct it once more after
// /init has.
func (s *Server) freeze(ctx context.Context) error {
	if err := s.tree.Freeze(ctx); err != nil || s.clock == nil {
		return err
	}
	if err := s.clock.Freeze(ctx); err != nil {
		s.log.Warn("cannot freeze chronyd", "error", err)
	}
	return nil
}

// thaw continues what freeze froze. It waits only for users' processes, because chronyd
// has the lowest priority.
func (s *Server) thaw(ctx context.Context) error {
	err := s.tree.Thaw(ctx)
	if s.clock != nil {
		err = errors.Join(err, s.clock.Release())
	}
	return err
}

// settle ends users' processes and syncs the disk.
func (s *Server) settle(ctx context.Context) error {
	if err := s.tree.Empty(ctx); err != nil {
		return err
	}
	unix.Sync()
	return nil
}

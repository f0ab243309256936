// Package envd is the guest daemon: it runs processes, moves files and
// reports, for whoever holds the sandbox's token.
package envd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
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
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Port is where the daemon listens in a guest.
const Port = 49983

// Config says how the daemon runs. Only DefaultUser is needed.
type Config struct {
	// DefaultUser is who requests are for that name nobody.
	DefaultUser string
	// Cgroup is the cgroup2 directory to keep users' processes in, which is
	// made; empty: none, and nothing can be frozen.
	Cgroup string
	// Clock is the cgroup2 directory of the program that keeps the clock. The server
	// freezes it with users' processes; empty: there is none.
	Clock string
	// Address is the guest's own address, at which services that listen on
	// loopback alone are made reachable; invalid: they are not.
	Address netip.Addr
	// Machine is what /init makes the sandbox's own; nil: the machine is not
	// the daemon's to change, and what /init says of it means nothing.
	Machine Machine
	Log     *slog.Logger
}

// Machine is what a guest that goes on from captured memory must change of
// itself. The package machine has the real one.
type Machine interface {
	// Reseed makes the kernel's random numbers independent of those of any
	// other machine with the same memory.
	Reseed(secret []byte) error
	Rename(hostname string) error
	// Export gives the sandbox's variables to processes whose environment is not
	// the daemon's.
	Export(envs map[string]string) error
	// SetClock puts the clock right; the host told its time at that time or
	// a little later.
	SetClock(host time.Time) error
	// Grow makes the root file system as large as its device, which has so many
	// bytes, and returns its size in bytes.
	Grow(ctx context.Context, bytes int64) (int64, error)
}

// Server is the daemon.
type Server struct {
	cfg        Config
	log        *slog.Logger
	tree       *cgroup.Tree     // nil: no cgroups
	clock      *cgroup.Tree     // nil: nothing that is frozen keeps the clock
	ports      *ports.Forwarder // nil: no service is made reachable
	processes  *process.Service
	filesystem *filesystem.Service
	handler    http.Handler
	open       connections

	initialising sync.Mutex // held by /init

	mu    sync.RWMutex
	state state
}

// state is what /init says.
type state struct {
	token   string // empty: not initialised
	envs    map[string]string
	user    string
	workdir string
}

// New makes a daemon that serves nothing but /health until it is initialised.
func New(cfg Config) (*Server, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: log, state: state{user: cfg.DefaultUser}}
	if cfg.Cgroup != "" {
		tree, err := cgroup.Open(cfg.Cgroup)
		if err != nil {
			// Processes run all the same; a kill may miss those that leave their group.
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
		s.ports = ports.New(ports.Config{Address: cfg.Address, Except: []uint16{Port}, Log: log})
	}

	// Users' requests: each is somebody's.
	user := http.NewServeMux()
	// A request may be compressed. Answers go a few centimetres; their
	// compression would only cost the guest time.
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
	s.handler = timed(mux)
	return s, nil
}

// Handler serves the daemon's whole interface.
func (s *Server) Handler() http.Handler { return s.handler }

// Run serves at addr ("host:port" or "unix:/path") until ctx is done; then it
// ends users' processes and returns. A Server runs once.
func (s *Server) Run(ctx context.Context, addr string) error {
	l, err := netaddr.Listen(ctx, addr, 0o600)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	srv := netaddr.Server(s.handler)
	s.open.watch(srv)
	srv.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)
	// A peer that is gone without a word (its host failed, this guest was
	// moved) is noticed by the answer that does not come.
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
		// Ending the processes ends the streams on them.
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

// Close ends users' processes and watchers. Run does so itself.
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

// look serves /ports: it looks for services to make reachable now, and not only at the
// next second.
func (s *Server) look(w http.ResponseWriter, r *http.Request) {
	if s.ports != nil {
		s.ports.Look(r.Context())
	}
	w.WriteHeader(http.StatusNoContent)
}

// freezeLimit is how long users' processes may take to stand still.
const freezeLimit = 5 * time.Second

// toTree returns a handler that calls do, within freezeLimit, if users' processes are
// in cgroups.
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

// freeze stops users' processes and the program that keeps the clock. Between a restore
// and /init, that program would measure how far the clock is behind. It would correct
// that too, after /init has.
func (s *Server) freeze(ctx context.Context) error {
	if err := s.tree.Freeze(ctx); err != nil || s.clock == nil {
		return err
	}
	if err := s.clock.Freeze(ctx); err != nil {
		s.log.Warn("the clock's program goes on", "error", err)
	}
	return nil
}

// thaw lets what freeze stopped go on. It waits for users' processes alone: the clock's
// program has the lowest priority.
func (s *Server) thaw(ctx context.Context) error {
	err := s.tree.Thaw(ctx)
	if s.clock != nil {
		err = errors.Join(err, s.clock.Release())
	}
	return err
}

// settle ends users' processes, and returns once all that is written is on the
// disk.
func (s *Server) settle(ctx context.Context) error {
	if err := s.tree.Empty(ctx); err != nil {
		return err
	}
	unix.Sync()
	return nil
}

// Package process implements the Connect service process.Process, which runs users'
// processes and transfers their input and output.
package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"

	"github.com/wrenn-dev/wrenn/internal/cork"
	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/cgroup"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

const (
	// KeepaliveHeader is a request header of streams: seconds between keepalives.
	KeepaliveHeader = "Keepalive-Ping-Interval"

	defaultKeepalive = 90 * time.Second
	maxMessage       = 32 << 20 // bytes of one request message
)

// Defaults apply to processes unless their request overrides them.
type Defaults struct {
	Envs    map[string]string
	Workdir string
}

// Config configures the service.
type Config struct {
	Tree     *cgroup.Tree    // nil: no cgroups, so a kill only reaches the process group
	Defaults func() Defaults // read at each start
	Log      *slog.Logger
}

// patience is how long a subscriber that reads nothing may delay the others of its process.
// A single subscriber only delays the process, like a full pipe. If its connection dies,
// which keepalives detect, so does the subscription.
const patience = 30 * time.Second

// Service is the Connect service. It owns the processes: they continue if the stream that
// started them breaks.
type Service struct {
	cfg Config
	// ticker is [time.NewTicker]. Tests replace it.
	ticker func(time.Duration) (c <-chan time.Time, stop func())

	mu     sync.Mutex
	byPID  map[uint32]*process
	closed bool
	wg     sync.WaitGroup // counts processes that were started and have not ended
}

// New returns a service without processes.
func New(cfg Config) *Service {
	if cfg.Tree != nil {
		cfg.Tree.Prepare()
	}
	ticker := func(d time.Duration) (<-chan time.Time, func()) {
		t := time.NewTicker(d)
		return t.C, t.Stop
	}
	return &Service{cfg: cfg, ticker: ticker, byPID: map[uint32]*process{}}
}

// Handler returns the path to mount the service at, and its handler.
func (s *Service) Handler(opts ...connect.HandlerOption) (string, http.Handler) {
	path, h := processconnect.NewProcessHandler(s, append(opts, connect.WithReadMaxBytes(maxMessage))...)
	return path, cork.Handler(h)
}

// Close kills every process, with cgroups also their descendants, and waits until they are
// gone or ctx is done.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for _, p := range s.byPID {
		p.kill()
	}
	s.mu.Unlock()
	if s.cfg.Tree != nil {
		if err := s.cfg.Tree.Kill(); err != nil {
			s.cfg.Log.Warn("kill users' processes", "error", err)
		}
	}
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// List implements processconnect.ProcessHandler.
func (s *Service) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	s.mu.Lock()
	res := &pb.ListResponse{}
	for _, p := range s.byPID {
		res.Processes = append(res.Processes, &pb.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
	}
	s.mu.Unlock()
	sort.Slice(res.Processes, func(i, j int) bool { return res.Processes[i].Pid < res.Processes[j].Pid })
	return connect.NewResponse(res), nil
}

// Start implements processconnect.ProcessHandler.
func (s *Service) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	who, err := account.FromContext(ctx)
	if err != nil {
		return fault.Connect(err)
	}
	timeout, err := processTimeout(ctx, req.Header())
	if err != nil {
		return err
	}
	every, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	p, sub, err := s.start(who, req.Msg, timeout)
	if err != nil {
		return fault.Connect(err)
	}
	return p.follow(ctx, sub, every, paced(ctx, req.Header().Get(hostwire.HoldStart) != "", func(e *pb.ProcessEvent) error {
		return stream.Send(&pb.StartResponse{Event: e})
	}))
}

// Connect implements processconnect.ProcessHandler.
func (s *Service) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], stream *connect.ServerStream[pb.ConnectResponse]) error {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	every, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	sub, err := p.subscribe()
	if err != nil {
		return err
	}
	return p.follow(ctx, sub, every, paced(ctx, false, func(e *pb.ProcessEvent) error {
		return stream.Send(&pb.ConnectResponse{Event: e})
	}))
}

// Update implements processconnect.ProcessHandler.
func (s *Service) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.Msg.GetPty() != nil {
		size, err := winsize(req.Msg.GetPty())
		if err != nil {
			return nil, err
		}
		if err := p.resize(size); err != nil {
			return nil, fault.Connect(err)
		}
	}
	return connect.NewResponse(&pb.UpdateResponse{}), nil
}

// StreamInput implements processconnect.ProcessHandler.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *process
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			if p != nil {
				return nil, invalid("the stream has started already")
			}
			var err error
			if p, err = s.find(e.Start.GetProcess()); err != nil {
				return nil, err
			}
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, invalid("the first message must be start")
			}
			if err := p.input(ctx, e.Data.GetInput()); err != nil {
				return nil, fault.Connect(err)
			}
		case *pb.StreamInputRequest_Keepalive:
		default:
			return nil, invalid("message without an event")
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}

// SendInput implements processconnect.ProcessHandler.
func (s *Service) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.input(ctx, req.Msg.GetInput()); err != nil {
		return nil, fault.Connect(err)
	}
	return connect.NewResponse(&pb.SendInputResponse{}), nil
}

// SendSignal implements processconnect.ProcessHandler. SIGKILL reaches every
// descendant; any other signal the process and its group.
func (s *Service) SendSignal(_ context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	// The enum is open, so any number is possible.
	n := int(req.Msg.GetSignal())
	if n < 1 || n > 64 {
		return nil, invalid("signal %d is not between 1 and 64", n)
	}
	if err := p.signal(syscall.Signal(n)); err != nil {
		return nil, fault.Connect(err)
	}
	return connect.NewResponse(&pb.SendSignalResponse{}), nil
}

// CloseStdin implements processconnect.ProcessHandler.
func (s *Service) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.closeStdin(ctx); err != nil {
		return nil, fault.Connect(err)
	}
	return connect.NewResponse(&pb.CloseStdinResponse{}), nil
}

// find returns the running process that sel names, the youngest of several with one tag.
func (s *Service) find(sel *pb.ProcessSelector) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch sel := sel.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		if p := s.byPID[sel.Pid]; p != nil {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with pid %d", sel.Pid))
	case *pb.ProcessSelector_Tag:
		var found *process
		for _, p := range s.byPID {
			if p.tag != nil && *p.tag == sel.Tag && (found == nil || p.started.After(found.started)) {
				found = p
			}
		}
		if found == nil {
			return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with tag %q", sel.Tag))
		}
		return found, nil
	}
	return nil, invalid("a pid or a tag is needed")
}

// processTimeout returns how long a process may run (0: without limit). If the header is
// missing, it is the request's own deadline, because E2B's clients pass a command's time
// limit as the deadline of its stream.
func processTimeout(ctx context.Context, h http.Header) (time.Duration, error) {
	if v := h.Get(hostwire.ProcessTimeout); v != "" {
		return seconds(hostwire.ProcessTimeout, v)
	}
	if t, ok := ctx.Deadline(); ok {
		return max(time.Until(t), time.Millisecond), nil
	}
	return 0, nil
}

func keepalive(h http.Header) (time.Duration, error) {
	v := h.Get(KeepaliveHeader)
	if v == "" {
		return defaultKeepalive, nil
	}
	d, err := seconds(KeepaliveHeader, v)
	if err == nil && d < 100*time.Millisecond {
		d = defaultKeepalive
	}
	return d, err
}

// seconds parses a header's whole or decimal number of seconds.
func seconds(header, v string) (time.Duration, error) {
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f >= 0 && f <= 365*24*3600) {
		return 0, invalid("header %s is not a number of seconds: %q", header, v)
	}
	return time.Duration(f * float64(time.Second)), nil
}

func winsize(p *pb.PTY) (*pty.Winsize, error) {
	cols, rows := p.GetSize().GetCols(), p.GetSize().GetRows()
	if cols == 0 {
		cols = 80
	}
	if rows == 0 {
		rows = 24
	}
	if cols > 0xffff || rows > 0xffff {
		return nil, invalid("a terminal of %d columns and %d rows", cols, rows)
	}
	return &pty.Winsize{Cols: uint16(cols), Rows: uint16(rows)}, nil
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

func failed(message string) error {
	return connect.NewError(connect.CodeFailedPrecondition, errors.New(message))
}

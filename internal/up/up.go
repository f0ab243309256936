// Package up runs everything on one machine: a private PostgreSQL and Redis, the control
// plane, the host agent and the front door. Each is a process that is restarted when it
// exits.
package up

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/handover"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/programs"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// domain is the suffix of sandboxes' host names. Browsers resolve all names below
// localhost to this machine.
const domain = "localhost"

// sandboxDomain is the setting for the sandboxes' own domain, which the server and the
// front door both must know.
const sandboxDomain = "WRENN_SANDBOX_DOMAIN"

// trustedProxies is the setting for proxies whose connections neither the server nor the
// front door limits.
const trustedProxies = "WRENN_TRUSTED_PROXIES"

// options are the command's flags.
type options struct {
	dir    string
	listen string
	// insecure allows plain HTTP on addresses that other machines can reach.
	insecure bool
	once     bool
}

// Command is `wrenn up`.
func Command(out io.Writer) *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use: "up", Short: "Run everything on this machine", Args: cobra.NoArgs,
		Long: "Run everything on this machine, in the foreground, until interrupted. Needs root and no configuration.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return run(ctx, o, out)
		},
	}
	f := cmd.Flags()
	dir := os.Getenv("WRENN_DIR")
	if dir == "" {
		dir = layout.DefaultDir
	}
	f.StringVar(&o.dir, "dir", dir, "data directory ($WRENN_DIR)")
	f.StringVar(&o.listen, "listen", "localhost:8000", "address of the front door")
	f.BoolVar(&o.insecure, "insecure", false, "allow --listen on an address that other machines can reach; passwords and keys cross the network in clear text")
	f.BoolVar(&o.once, "once", false, "start everything, run the self-check, stop everything")
	return cmd
}

// service has the parts that run starts and stops.
type service struct {
	dir     layout.Dir
	out     io.Writer
	spawner *spawner
	secrets secrets
	// The settings of server and agent, from the environment and the settings file.
	serverSettings, agentSettings settings.Values
	began                         time.Time
	stack                         []func() // functions that stop the parts, called in reverse order

	mu      sync.Mutex
	reloads []*child // programs that get this process's SIGHUPs
}

func (s *service) say(format string, args ...any) {
	fmt.Fprintf(s.out, "[%6.1fs] %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("wrenn up creates virtual machines and networks: run it as root")
	}
	if err := checkListen(ctx, o); err != nil {
		return err
	}
	abs, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	dir := layout.Dir(abs)
	// Other users must be able to reach their own files below, and see nothing else.
	for _, d := range []string{abs, dir.Run(), dir.Logs()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return fmt.Errorf("create data directory: %w", err)
		}
	}
	unlock, err := lock(filepath.Join(dir.Run(), "up.lock"))
	if err != nil {
		return err
	}
	defer unlock()

	spawning, stopSpawning := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSpawning()
	spawner, err := newSpawner(spawning)
	if err != nil {
		return err
	}
	s := &service{dir: dir, out: out, spawner: spawner, began: time.Now()}
	defer s.stopAll()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s.followHangups(stop)
	if err := s.start(ctx, o); err != nil {
		if ctx.Err() != nil {
			s.say("interrupted")
			return nil
		}
		return err
	}
	if err := s.selfCheck(ctx, o); err != nil {
		if ctx.Err() != nil {
			s.say("interrupted")
			return nil
		}
		return fmt.Errorf("self-check: %w", err)
	}
	if o.once {
		return nil
	}
	<-ctx.Done()
	s.say("stopping; pausing all sandboxes")
	return nil
}

// lock keeps other instances of `wrenn up` out of the data directory.
func lock(path string) (unlock func(), err error) {
	f, err := flock.TryLock(path)
	if errors.Is(err, flock.ErrLocked) {
		return nil, fmt.Errorf("another `wrenn up` runs on %s: choose another directory with --dir", filepath.Dir(filepath.Dir(path)))
	}
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	return func() { f.Close() }, nil
}

// stopAll stops all parts, the last one first.
func (s *service) stopAll() {
	for i := len(s.stack) - 1; i >= 0; i-- {
		s.stack[i]()
	}
	s.stack = nil
	s.say("stopped")
}

// launch starts a program, which stopAll stops.
func (s *service) launch(ctx context.Context, p program) error {
	c, err := launch(ctx, s.spawner, p, filepath.Join(s.dir.Logs(), strings.ToLower(strings.ReplaceAll(p.name, " ", "-"))+".log"), s.say)
	if err != nil {
		return err
	}
	s.stack = append(s.stack, c.close)
	if p.reloads {
		s.mu.Lock()
		s.reloads = append(s.reloads, c)
		s.mu.Unlock()
	}
	s.say("%s is ready", p.name)
	return nil
}

// followHangups passes each SIGHUP on to the programs that reload their log's settings. If
// it means that the terminal is gone, it calls stop instead. It does nothing if this
// process ignores SIGHUP, as under nohup.
func (s *service) followHangups(stop func()) {
	if signal.Ignored(syscall.SIGHUP) {
		return
	}
	had := hasTerminal()
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	s.during(func(ctx context.Context) {
		defer signal.Stop(hangups)
		for {
			select {
			case <-hangups:
				s.hangup(had && !hasTerminal(), stop)
			case <-ctx.Done():
				return
			}
		}
	})
}

// hangup handles a SIGHUP. gone reports that the terminal is gone.
func (s *service) hangup(gone bool, stop func()) {
	if gone {
		stop()
		return
	}
	s.mu.Lock()
	programs := slices.Clone(s.reloads)
	s.mu.Unlock()
	for _, c := range programs {
		c.signal(syscall.SIGHUP)
	}
}

// hasTerminal reports whether this process has a controlling terminal.
func hasTerminal() bool {
	f, err := os.Open("/dev/tty")
	if err == nil {
		_ = f.Close()
	}
	return err == nil
}

// during runs f until stopAll is called. f must return when its context is done.
func (s *service) during(f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	s.stack = append(s.stack, func() { cancel(); <-done })
}

// readSettings reads the settings of server and agent, and warns about names in the
// environment and the settings file that are not settings. A file with an error fails before
// anything starts.
func (s *service) readSettings() error {
	server, warnings, err := all.ServerProgram.Read(os.Environ())
	if err != nil {
		return err
	}
	hostAgent, ofAgent, err := all.AgentProgram.Read(os.Environ())
	if err != nil {
		return err
	}
	for _, w := range slices.Concat(all.Unknown(), warnings, ofAgent) {
		s.say("warning: %s", w)
	}
	s.serverSettings, s.agentSettings = server, hostAgent
	return nil
}

// start starts everything.
func (s *service) start(ctx context.Context, o options) (err error) {
	if err := s.readSettings(); err != nil {
		return err
	}
	// Before anything changes, as the agent does.
	if err := agent.CheckFormats(s.dir); err != nil {
		return err
	}
	// First, because its port may be in use.
	front, err := newFrontDoor(ctx, s.dir, o.listen, s.serverSettings)
	if err != nil {
		return err
	}
	s.stack = append(s.stack, front.close)
	if err := errors.Join(atomicfile.Sweep(s.dir.Secrets()), atomicfile.Sweep(s.dir.Credentials())); err != nil {
		s.say("warning: %v", err)
	}
	if s.secrets, err = loadSecrets(s.dir); err != nil {
		return err
	}
	// Before the server creates the admin, so that a crash cannot lose the password.
	url := publicURL(o.listen)
	err = atomicfile.WriteJSON(s.dir.Credentials(), credentials{URL: url, APIKey: s.secrets.AdminAPIKey, Email: adminEmail, Password: s.secrets.AdminPassword})
	if err != nil {
		return err
	}
	self, err := programs.Self()
	if err != nil {
		return err
	}
	envd, err := image.FindDaemon(s.agentSettings["WRENN_ENVD"])
	if err != nil {
		return err
	}
	progress := func(step string) { s.say("%s", step) }
	front.placeholder.prepares("the kernel and the base image, which takes a minute or two the first time")
	kernel, err := image.Kernel(ctx, s.dir, envd, progress)
	if err != nil {
		return err
	}
	minimal, err := image.EnsureMinimal(ctx, s.dir, envd, progress)
	if err != nil {
		return err
	}
	for _, stale := range []error{kernel.Stale, minimal.Stale} {
		if stale != nil {
			s.say("guests boot older images, because the newest cannot be built: %v", stale)
		}
	}
	s.say("images are ready")

	front.placeholder.prepares("the databases")
	pg, err := newPostgres(ctx, s.dir)
	if err != nil {
		return err
	}
	if err := s.launch(ctx, pg.program()); err != nil {
		return err
	}
	if err := pg.ensureDatabase(ctx, "wrenn"); err != nil {
		return err
	}
	if err := pg.reserveLog(ctx); err != nil {
		return err
	}
	if err := pg.inPlace(); err != nil {
		s.say("warning: %v", err)
	}
	s.during(func(ctx context.Context) { pg.keepRoom(ctx, s.say) })
	rd, err := newRedis(s.dir)
	if err != nil {
		return err
	}
	if err := s.launch(ctx, rd.program()); err != nil {
		return err
	}

	agentAt := "unix:" + s.dir.AgentSocket()
	server := "unix:" + s.dir.ServerSocket()
	hostAgent := s.own(self, all.AgentProgram, s.agentSettings, []string{
		"WRENN_DIR=" + string(s.dir), "WRENN_LISTEN=" + agentAt, "WRENN_AGENT_TOKEN=" + s.secrets.AgentToken, "WRENN_ENVD=" + envd,
		"WRENN_AGENT_METRICS_LISTEN=unix:" + s.dir.AgentMetricsSocket(),
		"WRENN_SERVER_URL=", "WRENN_HOST_TOKEN=", "WRENN_HOST_URL=",
	}, func(ctx context.Context) error {
		_, err := s.agent().Host(ctx, connect.NewRequest(&hostagentv1.HostRequest{}))
		return err
	})
	hostAgent.within = agentReadyTimeout
	hostAgent.beforeStop = func(ctx context.Context) error {
		_, err := s.agent().Terminate(ctx, connect.NewRequest(&hostagentv1.TerminateRequest{}))
		return err
	}
	front.placeholder.prepares("the host agent")
	if err := s.launch(ctx, hostAgent); err != nil {
		return err
	}
	front.placeholder.prepares("the control plane")
	err = s.launch(ctx, s.own(self, all.ServerProgram, s.serverSettings, []string{
		"WRENN_STOP_TIMEOUT=" + operationsTimeout.String(), "WRENN_INSECURE=" + strconv.FormatBool(o.insecure),
		"WRENN_SPOOL_DIR=" + s.dir.Spool(),
		"DATABASE_URL=" + pg.url("wrenn"), "REDIS_URL=" + rd.url(), "WRENN_LISTEN=" + server, "WRENN_METRICS_LISTEN=unix:" + s.dir.MetricsSocket(), "WRENN_DOMAIN=" + domain,
		"WRENN_PUBLIC_URL=" + url, "WRENN_SECRET_KEY=" + s.secrets.SecretKey, "WRENN_AGENT_URL=" + agentAt, "WRENN_AGENT_TOKEN=" + s.secrets.AgentToken,
		"WRENN_CA_CERT=", "WRENN_CA_KEY=",
		"WRENN_ADMIN_EMAIL=" + adminEmail, "WRENN_ADMIN_PASSWORD=" + s.secrets.AdminPassword, "WRENN_ADMIN_API_KEY=" + s.secrets.AdminAPIKey,
	}, func(ctx context.Context) error {
		if err := healthy(ctx, server); err != nil {
			return err
		}
		return errors.Join(openTo(front.user, s.dir.ServerSocket()), openTo(front.user, handover.Path(s.dir.ServerSocket())))
	}))
	if err != nil {
		return err
	}
	// The server stops after the agent, which reports its last events to it.
	n := len(s.stack)
	s.stack[n-1], s.stack[n-2] = s.stack[n-2], s.stack[n-1]
	return s.launch(ctx, front.program())
}

// own returns a program that this binary contains. It gets the settings in chosen; all
// others come from this process's environment, or the program reads them from the settings
// file. values has the settings of both.
func (s *service) own(self programs.Program, p settings.Program, values settings.Values, chosen []string, ready func(context.Context) error) program {
	env, unused := passed(p, values, append(chosen, "WRENN_DEBUG_LISTEN=unix:"+s.dir.DebugSocket(p.Name)))
	for _, name := range unused {
		s.say("warning: `wrenn up` ignores %s, because it chooses this itself", name)
	}
	return program{
		name: "wrenn " + p.Name,
		command: func() *exec.Cmd {
			cmd := self.Command(p.Name)
			cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}, env...)
			return cmd
		},
		ready:   func(ctx context.Context) error { return poll(ctx, ready) },
		quit:    syscall.SIGTERM,
		reloads: true,
	}
}

// passed returns the variables for a program: chosen, and those settings in this
// process's environment that chosen does not have. unused lists settings whose value in
// the environment or the settings file, which values has, differs from the chosen one.
func passed(p settings.Program, values settings.Values, chosen []string) (env, unused []string) {
	have := map[string]string{}
	for _, pair := range chosen {
		name, value, _ := strings.Cut(pair, "=")
		have[name] = value
	}
	env = slices.Clone(chosen)
	for _, s := range p.Settings {
		value, set := os.LookupEnv(s.Name)
		fixed, ok := have[s.Name]
		inFile, has := values[s.Name]
		switch {
		case set && !ok:
			env = append(env, s.Name+"="+value)
		case set && value != fixed:
			unused = append(unused, s.Name)
		case !set && ok && has && inFile != fixed:
			unused = append(unused, p.Name+"."+s.Key()+" in the settings file")
		}
	}
	return env, unused
}

// healthy returns an error unless the server reports that it is healthy.
func healthy(ctx context.Context, addr string) error {
	c, base := netaddr.HTTPClient(addr)
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return fmt.Errorf("unhealthy: %s", b)
	}
	return nil
}

// agent returns a client of the host agent.
func (s *service) agent() hostagentv1connect.HostAgentClient {
	c, base := netaddr.HTTPClient("unix:" + s.dir.AgentSocket())
	token := connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set("Authorization", "Bearer "+s.secrets.AgentToken)
			return next(ctx, req)
		}
	})
	return hostagentv1connect.NewHostAgentClient(c, base, connect.WithInterceptors(token))
}

// selfCheck runs a command in a sandbox as a client would.
func (s *service) selfCheck(ctx context.Context, o options) (err error) {
	c, err := client.New("http://"+dialable(o.listen), s.secrets.AdminAPIKey)
	if err != nil {
		return err
	}
	began := time.Now()
	never := 60
	box, err := c.Create(ctx, client.CreateOptions{TimeoutSeconds: &never, Metadata: map[string]string{"wrenn": "self-check"}})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err = errors.Join(err, c.Delete(ctx, box.ID))
	}()
	created := time.Since(began)
	r, err := c.Exec(ctx, box.ID, client.Command{Cmd: `uname -sr && python3 -c "print(6*7)"`, Shell: true}, nil)
	if err != nil {
		return err
	}
	if r.ExitCode != 0 || !strings.HasSuffix(string(r.Stdout), "\n42\n") {
		return fmt.Errorf("the command exited with %d and printed %q, %q", r.ExitCode, r.Stdout, r.Stderr)
	}
	s.say("self-check: a sandbox was there after %v, its command had run after %v, and printed:", created.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	fmt.Fprintf(s.out, "\n    %s\n\n", strings.ReplaceAll(strings.TrimSpace(string(r.Stdout)), "\n", "\n    "))
	s.announce(o)
	s.say("ready")
	return nil
}

// announce prints the service's addresses and the file that has the secrets. It
// prints no secret, because others may see the terminal or keep its output.
func (s *service) announce(o options) {
	url := publicURL(o.listen)
	ports := cmp.Or(s.serverSettings[sandboxDomain], domain)
	if _, port, _ := net.SplitHostPort(o.listen); port != "80" {
		ports = net.JoinHostPort(ports, port)
	}
	fmt.Fprintf(s.out, "  API      %s/v1   (documentation: %s/docs)\n", url, url)
	fmt.Fprintf(s.out, "  ports    http://PORT-SANDBOX.%s\n", ports)
	fmt.Fprintf(s.out, "  login    %s\n  secrets  %s   (the password and the API key)\n\n", adminEmail, s.dir.Credentials())
}

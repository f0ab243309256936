// Package agent is the host agent: it runs the sandboxes of one machine for the
// control plane.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/proxy"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/drivers"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// Config configures an agent. The tags declare its settings (see internal/settings).
type Config struct {
	Dir layout.Dir `env:"WRENN_DIR" envDefault:"/var/lib/wrenn" help:"data directory"`
	// Listen is for the caller, which serves [Agent.Handler]. New does not listen.
	Listen string `env:"WRENN_LISTEN" help:"address to listen on: host:port or unix:/path (--listen)"`
	// MetricsListen is for the caller, too, which serves [Agent.Metrics].
	MetricsListen    string         `env:"WRENN_AGENT_METRICS_LISTEN" help:"address of /metrics for Prometheus, which needs no credential there: host:port or unix:/path; empty: no metrics"`
	Token            string         `env:"WRENN_AGENT_TOKEN,unset" help:"token that the server must send, if the agent does not register itself"`
	Accel            string         `env:"WRENN_VMM_ACCEL" envDefault:"auto" help:"what runs guests' instructions: kvm, tcg (emulation), or auto, which is kvm if a kernel boots on it"`
	NoSeccomp        bool           `env:"WRENN_NO_SECCOMP" help:"run QEMU without Wrenn's seccomp filter, in case it needs a system call that the filter forbids; this removes one wall around each guest"`
	Processor        string         `env:"WRENN_CPU_MODEL" help:"processor of guests, by QEMU's name (EPYC-v3), so that different hosts can restore one another's snapshots; empty: the host's own (docs/architecture/storage.md)"`
	Balloon          bool           `env:"WRENN_FREE_PAGE_REPORTING" help:"new guests return memory that they free to the host, which also makes pauses smaller; memory that they take again costs more (docs/architecture/storage.md)"`
	NestedTeams      []sandbox.Team `env:"WRENN_NESTED_TEAMS" help:"ids of the teams whose guests may run virtual machines of their own, with commas between them (security.md)"`
	DNS              []netip.Addr   `env:"WRENN_DNS" help:"IPv4 addresses of the guests' resolvers; empty: the host's"`
	MemoryMiB        int            `env:"WRENN_MEMORY_MIB" help:"memory in MiB for all sandboxes; 0: most of the host's"`
	DefaultVCPUs     int            `env:"WRENN_DEFAULT_VCPUS" envDefault:"1" help:"processors of most sandboxes: the agent captures such a VM when it starts, unless this is 0"`
	DefaultMemoryMiB int            `env:"WRENN_DEFAULT_MEMORY_MIB" envDefault:"512" help:"memory of most sandboxes in MiB, and so of the VM of WRENN_DEFAULT_VCPUS"`
	Warm             int            `env:"WRENN_WARM" envDefault:"1" help:"restored VMs that wait for the next sandboxes, for each template in use"`
	WarmMemoryMiB    int            `env:"WRENN_WARM_MEMORY_MIB" help:"memory in MiB for all VMs that wait; 0: an eighth of WRENN_MEMORY_MIB"`
	DiskReserveMiB   int            `env:"WRENN_DISK_RESERVE_MIB" envDefault:"2048" help:"free disk space in MiB below which the agent only starts pauses of running sandboxes"`
	// Rates limit each sandbox's use of the host's disk and network.
	Rates rates.Rates
	// TemplateRates override Rates for the sandboxes of some templates.
	TemplateRates     rates.Templates `env:"WRENN_TEMPLATE_RATES" help:"other limits for the sandboxes of some templates, such as tpl-…:disk_ops=100,net_bytes=0 (sharing.md)"`
	Envd              string          `env:"WRENN_ENVD" help:"path of the guest daemon's binary; empty: beside wrenn"`
	LocalRegistries   bool            `env:"WRENN_LOCAL_REGISTRIES" help:"allow imports of images from registries on this machine, over plain HTTP; whoever may import images can then send requests to any service on loopback"`
	PrivateRegistries bool            `env:"WRENN_PRIVATE_REGISTRIES" help:"allow imports of images from registries in private networks; whoever may import images can then send requests there"`
	// BootTimeout bounds one boot (0: two minutes). Only tests change it.
	BootTimeout time.Duration `env:"-"`
	// Hook, if not nil, is called at each step after which a test may kill the agent.
	Hook    func(step string) `env:"-"`
	Version string            `env:"-"`
	// Trace records spans for requests that the server traces (nil: none).
	Trace *tracing.Tracer `env:"-"`
	Log   *slog.Logger    `env:"-"`
}

// lastEventsTimeout bounds how long a terminating agent waits for the control plane to
// acknowledge the last events.
const lastEventsTimeout = 3 * time.Second

// Agent is the host agent. A data directory can have only one open at a time.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	lock      *os.File
	problems  *problem.List
	guarding  sync.WaitGroup
	unguard   context.CancelFunc
	driver    vmm.Driver
	journal   *journal.Journal
	pool      *network.Pool
	sandboxes *sandbox.Manager
	proxy     *proxy.Proxy
	metrics   *metrics
	handler   http.Handler
	envd      string // the guest daemon's path
	imports   imports

	stopping  chan struct{} // closed: endless streams must end
	stop      func()
	done      chan struct{} // closed: terminated
	terminate func()
	listeners atomic.Int32 // open streams of events
	closing   func() error
}

// New opens an agent. It adopts the sandboxes that an earlier agent left running,
// removes that agent's other leftovers, and prepares the kernel and the minimal image.
func New(ctx context.Context, c Config) (*Agent, error) {
	a, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("open host agent: %w", err)
	}
	return a, nil
}

func open(ctx context.Context, c Config) (_ *Agent, err error) {
	if c.Token == "" {
		return nil, errors.New("an agent token is required")
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	a := &Agent{cfg: c, log: c.Log, stopping: make(chan struct{}), done: make(chan struct{})}
	a.stop = sync.OnceFunc(func() { close(a.stopping) })
	a.terminate = sync.OnceFunc(func() { close(a.done) })
	a.closing = sync.OnceValue(a.close)
	defer func() {
		if err != nil {
			err = errors.Join(err, a.closing())
		}
	}()

	for _, dir := range []string{string(c.Dir), c.Dir.Run()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	a.lock, err = flock.TryLock(c.Dir.AgentLock())
	if errors.Is(err, flock.ErrLocked) {
		return nil, fmt.Errorf("another host agent uses the same data directory: %w", err)
	}
	if err != nil {
		return nil, err
	}
	// Before anything is changed, so that the later release can be installed again.
	if err := CheckFormats(c.Dir); err != nil {
		return nil, err
	}
	a.sweep()
	a.problems = problem.Open(c.Dir.Problems(), a.log)
	if err := a.setAside(); err != nil {
		return nil, err
	}
	kernel, err := a.prepare(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.openDriver(ctx, kernel); err != nil {
		return nil, err
	}
	if a.journal, err = journal.Open(c.Dir); err != nil {
		return nil, err
	}
	if err := a.journal.Full(); err != nil {
		a.log.Error("the disk is full: starting without compacting the journal", "error", err)
	}
	if n := a.journal.Dropped(); n > 0 {
		a.log.Warn("discarded a torn write at the end of the journal", "bytes", n)
	}
	if i := a.journal.Damaged(); i != nil {
		a.log.Error("the journal is damaged; a copy was set aside", "path", i.Path, "reason", i.Reason)
	}
	// Machines first: their slots must stay.
	found, err := sandbox.Recover(ctx, c.Dir, a.driver, a.log)
	if err != nil {
		return nil, err
	}
	guests, err := sandbox.Most(c.MemoryMiB)
	if err != nil {
		return nil, err
	}
	a.pool, err = network.Open(ctx, network.Config{Dir: c.Dir, Upstreams: c.DNS, Guests: guests, Rates: c.Rates, Problems: a.problems, Unknown: found.Unknown(), Log: a.log}, found.Slots())
	if err != nil {
		return nil, err
	}
	a.metrics = newMetrics()
	a.sandboxes, err = sandbox.Open(ctx, sandbox.Config{
		Dir: c.Dir, Driver: a.driver, Networks: sandbox.Pool(a.pool), Journal: a.journal,
		Kernel: kernel.Vmlinux, Initrd: kernel.Initrd, Modules: kernel.Modules, KernelInputs: kernel.Inputs, Template: a.template, MemoryMiB: c.MemoryMiB, DiskReserveMiB: c.DiskReserveMiB, Rates: c.Rates, TemplateRates: c.TemplateRates, NestedTeams: c.NestedTeams,
		DefaultVCPUs: c.DefaultVCPUs, DefaultMemoryMiB: c.DefaultMemoryMiB, Warm: c.Warm, WarmMemoryMiB: c.WarmMemoryMiB, BootTimeout: c.BootTimeout, Hook: c.Hook,
		Problems: a.problems, Observe: a.metrics.observe, Log: a.log,
	}, found)
	if err != nil {
		return nil, err
	}
	guard, unguard := context.WithCancel(context.WithoutCancel(ctx))
	a.unguard = unguard
	if err := a.guardHost(guard); err != nil {
		return nil, err
	}
	a.proxy = proxy.New(a.sandboxes.Use, a.log)
	a.metrics.registerState(a)
	a.handler = a.routes()
	return a, nil
}

// sweep removes the temporary files that a killed agent left outside of the sandboxes'
// folders. This agent holds the lock on the data, so nobody else is writing them.
func (a *Agent) sweep() {
	d := a.cfg.Dir
	err := atomicfile.SweepDir(d.Unreadable())
	for _, path := range []string{d.Events(), d.Problems(), d.NetworkBlock(), d.Enrollment()} {
		err = errors.Join(err, atomicfile.Sweep(path))
	}
	if err != nil {
		a.log.Warn("cannot remove a killed agent's temporary files", "error", err)
	}
}

// prepare builds the kernel files and the minimal image if they are missing or stale.
func (a *Agent) prepare(ctx context.Context) (image.KernelFiles, error) {
	envd, err := image.FindDaemon(a.cfg.Envd)
	if err != nil {
		return image.KernelFiles{}, err
	}
	a.envd = envd
	progress := func(step string) { a.log.Info(step) }
	kernel, err := image.Kernel(ctx, a.cfg.Dir, envd, progress)
	if err != nil {
		return image.KernelFiles{}, err
	}
	minimal, err := image.EnsureMinimal(ctx, a.cfg.Dir, envd, progress)
	if err != nil {
		return image.KernelFiles{}, err
	}
	for _, stale := range []error{kernel.Stale, minimal.Stale} {
		if stale != nil {
			a.log.Warn("cannot rebuild what guests boot from, so they use the previous build; the next start tries again", "error", stale)
		}
	}
	return kernel, nil
}

func (a *Agent) openDriver(ctx context.Context, kernel image.KernelFiles) error {
	dir := a.cfg.Dir.VMM()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if a.cfg.NoSeccomp {
		a.problems.Report(problem.Jail, "seccomp", "WRENN_NO_SECCOMP is set: a guest that takes over its virtual machine monitor can make any system call that the monitor's own filter allows; unset it, and report which call your monitor needs")
	} else {
		a.problems.Clear(problem.Jail, "seccomp")
	}
	d, err := drivers.Open(ctx, cmp.Or(a.cfg.Accel, drivers.Auto), vmm.Config{
		Dir: dir, Kernel: kernel.Vmlinux, Initrd: kernel.Initrd, Unfiltered: a.cfg.NoSeccomp, Processor: a.cfg.Processor, Balloon: a.cfg.Balloon, Log: a.log,
	})
	if err != nil {
		return err
	}
	a.driver = d
	return nil
}

// template finds a template that belongs to the team or to the platform.
func (a *Agent) template(team, id uuid.UUID) (image.Template, error) {
	for _, owner := range []uuid.UUID{team, uuid.Nil} {
		t, err := image.Find(a.cfg.Dir, owner, id)
		if !errors.Is(err, fs.ErrNotExist) {
			return t, err
		}
	}
	return image.Template{}, fmt.Errorf("%w: no such template on this host", sandbox.ErrNotFound)
}

// ToPort reports whether the handler forwards a request to a sandbox's port.
func (a *Agent) ToPort(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, hostwire.ProxyPrefix)
}

// Handler returns the handler of all the agent's requests, for a [netaddr.Server].
func (a *Agent) Handler() http.Handler { return a.handler }

// Metrics returns the handler of /metrics for a listener of its own. It needs no
// credentials. Prometheus must not have the token of [Agent.Handler], which controls every
// guest.
func (a *Agent) Metrics() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	return mux
}

// Run waits until ctx is done or a call terminated the agent, after which no sandbox
// runs. It ends endless streams as it returns.
func (a *Agent) Run(ctx context.Context) error {
	defer a.stop()
	select {
	case <-ctx.Done():
	case <-a.done:
	}
	return nil
}

// Close releases the agent's resources. Running sandboxes keep running, and the next
// agent adopts them.
func (a *Agent) Close() error { return a.closing() }

// CloseTimeout bounds Close's wait for operations on sandboxes. wrenn-agent.service allows
// for it (TestUnitsWait).
const CloseTimeout = 90 * time.Second

func (a *Agent) close() error {
	a.stop()
	ctx, cancel := context.WithTimeout(context.Background(), CloseTimeout)
	defer cancel()
	var errs []error
	var slots []int
	if a.unguard != nil {
		a.unguard()
		a.guarding.Wait()
	}
	if a.sandboxes != nil {
		var err error
		slots, err = a.sandboxes.Close(ctx)
		errs = append(errs, err)
	}
	if a.pool != nil {
		errs = append(errs, a.pool.Close(ctx, slots))
	}
	if a.driver != nil {
		errs = append(errs, a.driver.Close())
	}
	if a.journal != nil {
		errs = append(errs, a.journal.Close())
	}
	if a.problems != nil {
		errs = append(errs, a.problems.Close())
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

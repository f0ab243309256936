// Package qemu runs virtual machines with QEMU, with KVM or by emulation.
//
// Each QEMU is a process without rights: it runs in its sandbox's network namespace, in a
// jail, as a user of its own without capabilities, and receives every file that it needs as
// an open descriptor.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/launcher"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

// The accelerators.
const (
	KVM = vmm.KVM
	TCG = vmm.TCG
)

// name is the name of the driver.
const name = "qemu"

// Program is QEMU.
var Program = programs.Add(programs.Program{File: "/usr/bin/qemu-system-x86_64", Package: "qemu-system-x86"})

const (
	// overheadBytes is the memory that QEMU needs besides the guest's, for code, heap, and
	// buffers of disks and network.
	overheadBytes = 192 << 20
	// translationMiB bounds TCG's cache of translated code. TCG needs about as much again to
	// manage it.
	translationMiB = 64
	// maxFiles bounds QEMU's descriptors. It needs a few for each layer of the disk.
	maxFiles = 1024
	// maxThreads bounds QEMU's threads for input, output and blocking file operations.
	maxThreads = 96
	socketName = "qmp.sock"
	// startTimeout bounds the time from QEMU's start to its first response.
	startTimeout = 30 * time.Second
)

// Driver implements vmm.Driver.
type Driver struct {
	accel  string
	jail   *cell
	bootID string
	tscKHz int // rate of an emulated guest's time stamp counter
	about
	host      string    // digest of the host's processor
	processor processor // the processor of booting guests
	balloon   bool      // booting guests return memory that they free
	library   *os.File  // nil: QEMU cannot load it
	// launcher starts QEMU with limits that a process can only set for itself.
	launcher *launcher.Launcher
	// standIn is set by tests that run this program instead of QEMU. It is the last argument.
	standIn string
	// starts bounds the time from QEMU's start until its machine is ready.
	starts time.Duration
	// endings are the machines that are being ended.
	endings endings
	log     *slog.Logger
}

// Open returns a driver for QEMU with the accelerator [KVM] or [TCG]. It does not check
// whether a guest boots; see [KVMWorks].
func Open(accel string, c vmm.Config) (_ *Driver, err error) {
	if accel != KVM && accel != TCG {
		return nil, fmt.Errorf("open QEMU driver: unknown accelerator %q", accel)
	}
	if _, err := Program.Find(); err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	if err := cgroup.Available(); err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	library, err := newLibrary()
	if err != nil {
		c.Log.Debug("guests cannot return memory", "error", err)
	}
	defer func() {
		if err != nil && library != nil {
			library.Close()
		}
	}()
	a, err := ask(accel, library)
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	if c.Balloon && !a.balloons {
		return nil, fmt.Errorf("open QEMU driver: %w", errNoBalloon)
	}
	host, err := hostProcessor(accel)
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	cpu, err := newProcessor(accel, c.Processor, a, host)
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	khz, err := tscKHz()
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	var seccomp [][]unix.SockFilter
	if !c.Unfiltered {
		if seccomp, err = filters(accel); err != nil {
			return nil, fmt.Errorf("open QEMU driver: %w", err)
		}
	}
	l, err := launcher.New(seccomp)
	if err != nil {
		return nil, fmt.Errorf("open QEMU driver: %w", err)
	}
	j, err := newCell(filepath.Join(c.Dir, "jail"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open QEMU driver: %w", err), l.Close())
	}
	return &Driver{accel: accel, jail: j, bootID: strings.TrimSpace(string(bootID)), tscKHz: khz, about: a, host: host.host, processor: cpu, balloon: c.Balloon, library: library, launcher: l, starts: startTimeout, log: c.Log}, nil
}

// Name implements vmm.Driver.
func (d *Driver) Name() string { return name }

// Accelerator implements vmm.Driver.
func (d *Driver) Accelerator() string { return d.accel }

// Disks implements vmm.Driver.
func (d *Driver) Disks() disk.Format { return disk.Qcow2 }

// Close implements vmm.Driver.
func (d *Driver) Close() error {
	var library error
	if d.library != nil {
		library = d.library.Close()
	}
	return errors.Join(d.launcher.Close(), library, d.jail.close(), cgroup.RemoveParent())
}

// limits returns the limits of a machine's control group.
func (d *Driver) limits(s vmm.Spec) cgroup.Limits {
	l := cgroup.Limits{
		// Twice the guest's memory: when the guest touches a hole of the mapped file, the
		// kernel fills the hole with a page, and when it writes, the kernel copies that page.
		// Both count for this group, although all machines share the former.
		MemoryBytes: 2*int64(s.MemoryMiB)<<20 + overheadBytes,
		CPUs:        float64(s.VCPUs),
		PIDs:        int64(maxThreads + s.VCPUs),
		Weight:      s.VCPUs,
	}
	if d.accel == TCG {
		l.MemoryBytes += 2 * translationMiB << 20
		l.CPUs++ // for QEMU's threads besides those of the guest's processors
	}
	return l
}

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, s vmm.Spec) (vmm.VM, error) {
	ram, err := emptyMemory(int64(s.MemoryMiB) << 20)
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	defer ram.Close()
	cpu := d.processor
	cpu.nested = s.Nested
	vm, err := d.launch(ctx, s, d.boots(), cpu, ram, nil, func(ctx context.Context, m *machine) error {
		return m.qmp.Execute(ctx, "cont", nil, nil)
	})
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	return vm, nil
}

// launch starts a QEMU with the model and the processor. QEMU maps ram as its guest's memory
// and, unless incoming is nil, reads the state of its devices from there. launch calls ready
// when QEMU accepts commands. After an error, nothing is left.
func (d *Driver) launch(ctx context.Context, s vmm.Spec, as model, cpu processor, ram, incoming *os.File, ready func(context.Context, *machine) error) (_ *machine, err error) {
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()

	if s.Overlay != "" && s.DiskBytes <= 0 {
		return nil, errors.New("the size of the disk is not set")
	}
	memoryBytes := int64(s.MemoryMiB) << 20
	mapped, err := checkMemory(ram, memoryBytes)
	if err != nil {
		return nil, err
	}
	group, err := cgroup.Create(s.ID.String(), d.limits(s))
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() error { return group.Destroy(context.WithoutCancel(ctx)) })

	h := &handed{}
	defer h.close()
	socket := filepath.Join(s.Dir, socketName)
	control, err := listen(socket)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	undo = append(undo, func() error { return removeSocket(socket) })
	args, err := d.arguments(s, as, cpu, control, ram, incoming, h)
	if err != nil {
		return nil, err
	}
	stderr, err := memfd("stderr")
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	var env []string
	if as.balloon {
		env = append(env, preload(h.add(d.library)))
	}
	cmd, err := d.exec(s, group, args, env, h.files, stderr)
	if err != nil {
		return nil, err
	}
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	m := &machine{
		state: vmm.State{
			ID: s.ID, PID: cmd.Process.Pid, StartTime: start, BootID: d.bootID, Socket: socket, Kind: d.kindAs(as, cpu),
			MemoryDevice: mapped.Dev, MemoryInode: mapped.Ino, MemoryBytes: memoryBytes,
		},
		group: group, done: make(chan struct{}), endings: &d.endings, log: d.log,
	}
	go func() { // ends with QEMU
		_ = cmd.Wait()
		m.ended(cmd.ProcessState.Sys().(syscall.WaitStatus))
		close(m.done)
	}()
	undo = append(undo, func() error { return m.Kill(context.WithoutCancel(ctx)) })

	wait, cancel := context.WithTimeout(ctx, d.starts)
	defer cancel()
	stop := closedToCancel(m.done, cancel)
	defer stop()
	err = m.connect(wait)
	if err == nil {
		err = m.limit(wait, s.Rates)
	}
	if err == nil {
		err = ready(wait, m)
	}
	if err != nil {
		return nil, errors.Join(err, m.stopped(), complaint(stderr))
	}
	go m.handleEvents(false)
	return m, nil
}

// closedToCancel calls cancel when done is closed, until stop is called.
func closedToCancel(done <-chan struct{}, cancel func()) (stop func()) {
	stopped := make(chan struct{})
	go func() {
		select {
		case <-done:
			cancel()
		case <-stopped:
		}
	}()
	return func() { close(stopped) }
}

// handed collects the files that a QEMU inherits as descriptors.
type handed struct {
	files  []*os.File
	opened []*os.File
}

// add adds f and returns its number in QEMU. The caller still owns f.
func (h *handed) add(f *os.File) int {
	h.files = append(h.files, f)
	return 2 + len(h.files)
}

// open opens a file, adds it and returns its number in QEMU.
func (h *handed) open(name string, flag int) (int, error) {
	f, err := os.OpenFile(name, flag|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	h.opened = append(h.opened, f)
	return h.add(f), nil
}

func (h *handed) close() {
	for _, f := range h.opened {
		f.Close()
	}
}

// arguments returns QEMU's arguments, and adds the files that they refer to, to h.
//
// A restored guest must see the same hardware as before. To change what guests see, add a
// [model].
func (d *Driver) arguments(s vmm.Spec, as model, cpu processor, control, ram, incoming *os.File, h *handed) ([]string, error) {
	if incoming != nil {
		h.add(incoming) // first, so that it is incomingFD
	}
	args := []string{
		"-name", "wrenn-" + s.ID.String(),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-S", // the guest must not run before all its limits apply
		// mem-merge=off, because merged pages let guests spy on one another.
		// dump-guest-core=off keeps the guest's memory out of core dumps.
		"-machine", "microvm,x-option-roms=off,rtc=on,isa-serial=on,memory-backend=ram,mem-merge=off,dump-guest-core=off" + as.machine,
		// Newer QEMUs default to SeaBIOS, which does not start a kernel without an option ROM.
		"-bios", "qboot.rom",
		"-accel", as.accel, "-cpu", as.cpuOption(cpu),
		"-smp", processors(as, s.VCPUs), "-m", fmt.Sprintf("%dM", s.MemoryMiB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,share=off,mem-path=/proc/self/fd/%d", s.MemoryMiB, h.add(ram)),
		// QEMU keeps a guest that ends, also by a panic, until handleEvents has read its console.
		"-action", "reboot=shutdown,shutdown=pause",
		"-chardev", fmt.Sprintf("socket,id=control,fd=%d,server=on,wait=off", h.add(control)), "-mon", "chardev=control,mode=control",
		"-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", consoleBytes), "-serial", "chardev:console",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng",
	}
	if incoming != nil {
		// No kernel, because the guest's memory has it already.
		args = append(args, "-incoming", "defer", "-global", "migration.send-configuration=off")
	} else {
		kernel, err := h.open(s.Kernel, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		initrd, err := h.open(s.Initrd, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		cmdline := s.Cmdline
		if d.accel == TCG {
			// Mitigations of speculation cost time, and do not protect translated code.
			cmdline += fmt.Sprintf(" tsc_early_khz=%d mitigations=off possible_cpus=%d", d.tscKHz, s.VCPUs)
		}
		args = append(args,
			"-kernel", fmt.Sprintf("/proc/self/fd/%d", kernel),
			"-initrd", fmt.Sprintf("/proc/self/fd/%d", initrd),
			"-append", cmdline)
	}
	disks, err := diskArguments(s, as, h)
	if err != nil {
		return nil, err
	}
	args = append(args, disks...)
	if s.Tap != nil {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net,fd=%d", h.add(s.Tap)),
			"-device", "virtio-net-device,netdev=net,guest_announce=off,mac="+s.MAC)
	}
	if as.balloon {
		args = append(args, "-device", balloonDevice)
	}
	return args, nil
}

// processors returns the value of -smp. If an emulated machine cannot have a second
// processor, QEMU leaves out the guest's memory barriers. But its own threads access the
// queues of virtio devices concurrently, so a notification can get lost, which stops the
// device for good. So an emulated machine has room for a second processor.
func processors(as model, n int) string {
	if strings.HasPrefix(as.accel, TCG) {
		return fmt.Sprintf("%d,maxcpus=%d", n, max(n, 2))
	}
	return strconv.Itoa(n)
}

// exec starts QEMU in its jail, with its limits. env is added to its environment.
func (d *Driver) exec(s vmm.Spec, group cgroup.Group, args, env []string, files []*os.File, stderr *os.File) (*exec.Cmd, error) {
	groupDir, err := group.Open()
	if err != nil {
		return nil, err
	}
	cmd := Program.Command(args...)
	if d.standIn != "" {
		cmd.Path = fmt.Sprintf("/proc/self/fd/%d", 3+len(files)) // the launcher's next descriptor
		cmd.Args = append(cmd.Args, d.standIn)
	}
	cmd.Env, cmd.Dir = append([]string{"PATH=/usr/bin"}, env...), "/"
	cmd.Stderr, cmd.ExtraFiles = stderr, files
	d.launcher.Wrap(cmd, launcher.Limits{FileBytes: fileBytes(s.DiskBytes), Files: maxFiles, Tasks: uint64(d.limits(s).PIDs)})
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.UID)},
		Setsid:     true, // so that it outlives the agent
		Cloneflags: unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
	}
	if groupDir != nil {
		defer groupDir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(groupDir.Fd())
	}
	// QEMU must not inherit descriptors that this process inherited.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keep descriptors from QEMU: %w", err)
	}
	if err := d.jail.do(s.NetNS, group, cmd.Start); err != nil {
		if cmd.Process != nil { // it runs, but the thread could not leave its namespace or group
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		return nil, err
	}
	return cmd, nil
}

// fileBytes returns the maximum size of a file that a machine with such a disk writes: an
// overlay with the whole disk, qcow2's tables and a margin.
func fileBytes(disk int64) int64 { return disk + disk>>8 + 64<<20 }

// listen makes the control socket, to which only root can connect, and returns its
// descriptor. The path may be longer than a socket's address.
func listen(path string) (*os.File, error) {
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	defer unix.Close(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))})
	if err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("make control socket: %w", err)
	}
	return l.File()
}

func removeSocket(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// memfd makes a file in memory. What QEMU writes to it counts as QEMU's memory.
func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// complaintError is the end of what QEMU wrote to its standard error.
type complaintError string

func (e complaintError) Error() string { return "QEMU's error output: " + string(e) }

// complaint returns a [complaintError], or nil if QEMU wrote nothing.
func complaint(stderr *os.File) error {
	const most = 4 << 10
	info, err := stderr.Stat()
	if err != nil {
		return err
	}
	buf := make([]byte, most)
	n, err := stderr.ReadAt(buf, max(0, info.Size()-most))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if text := bytes.TrimSpace(buf[:n]); len(text) > 0 {
		return complaintError(text)
	}
	return nil
}

// startTime returns the start time of a process in clock ticks since the host's boot: field
// 22 of /proc/PID/stat (proc(5)).
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(string(b))
}

func parseStartTime(stat string) (uint64, error) {
	// The second field is a name in parentheses, which may contain anything.
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errors.New("read start time of process: no name")
	}
	f := strings.Fields(stat[i+1:])
	if len(f) < 20 {
		return 0, errors.New("read start time of process: too few fields")
	}
	return strconv.ParseUint(f[19], 10, 64)
}

var _ vmm.Driver = (*Driver)(nil)

// connect connects to QEMU's control socket.
func (m *machine) connect(ctx context.Context) (err error) {
	m.qmp, err = qmp.Dial(ctx, m.state.Socket)
	return err
}

package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
)

// patience bounds every manual step.
const patience = 5 * time.Minute

func version(t *testing.T) string {
	t.Helper()
	out, err := qemu.Program.Command("--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "QEMU emulator version ")
}

// bare is the configuration of a QEMU started by hand: the command line of a machine that
// the agent has restored, with other files. It is not jailed.
type bare struct {
	cmdline []string
	ram     *os.File // the guest's initial memory; nil: allocated by QEMU
	disk    []string // from the lowest layer up; the last is writable
	token   string   // the guest daemon's access token
}

// under returns the files of a capture's disk, from the lowest layer up.
func under(c *image.Capture) []string {
	files := []string{c.Rootfs()}
	for n := range c.Layers {
		files = append(files, c.Layer(n))
	}
	return files
}

// cmdline returns the command line of a sandbox's machine.
func cmdline(t *testing.T, sandbox string) []string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", agenttest.QEMU(sandbox)))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// process is a QEMU started by hand.
type process struct {
	cmd   *exec.Cmd
	conn  *net.UnixConn
	qmp   *qmp.Conn
	guest *guest.Client
	end   func()
}

// incomingFD is the driver's descriptor number for the state of devices.
const incomingFD = 3

var descriptors = struct{ ram, size, control, disk, tap *regexp.Regexp }{
	regexp.MustCompile(`mem-path=/proc/self/fd/(\d+)`),
	regexp.MustCompile(`size=\d+M`),
	regexp.MustCompile(`^socket,id=control,fd=(\d+)`),
	regexp.MustCompile(`^fd=(\d+),set=(\d+)(,opaque=write)?`),
	regexp.MustCompile(`^tap,id=net,fd=(\d+)`),
}

// prepare opens everything that a QEMU needs, so that start only starts it. With alone,
// QEMU continues from incoming by itself; otherwise it stays stopped and is controlled
// over QMP.
func (b bare) prepare(t *testing.T, h *host, incoming *os.File, alone bool) (start func() *process) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	slot, err := h.pool.Acquire(t.Context())
	must(err)
	tap, err := slot.OpenTap()
	must(err)
	dir, err := os.MkdirTemp(h.dir, "q-")
	must(err)
	socket := filepath.Join(dir, "qmp")
	control, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	must(err)
	listener, err := control.File()
	must(err)
	opened := []io.Closer{tap, listener, control}

	// The descriptors, by their numbers in QEMU.
	files := map[int]*os.File{incomingFD: incoming}
	var args []string
	for _, a := range b.cmdline[1:] {
		number := func(re *regexp.Regexp) int {
			if m := re.FindStringSubmatch(a); m != nil {
				n, _ := strconv.Atoi(m[1])
				return n
			}
			return 0
		}
		switch {
		case number(descriptors.ram) > 0:
			files[number(descriptors.ram)] = b.ram
			if b.ram == nil {
				files[number(descriptors.ram)] = listener // keeps the numbers
				m := descriptors.size.FindStringSubmatch(a)
				if m == nil {
					t.Fatalf("no memory size in %s", a)
				}
				a = "memory-backend-ram,id=ram," + m[0]
			}
		case number(descriptors.control) > 0:
			files[number(descriptors.control)] = listener
		case number(descriptors.tap) > 0:
			files[number(descriptors.tap)] = tap
		case number(descriptors.disk) > 0:
			m := descriptors.disk.FindStringSubmatch(a)
			set, _ := strconv.Atoi(m[2])
			if set < 1 || set > len(b.disk) {
				t.Fatalf("the disk has %d files, and QEMU wants the one of set %d", len(b.disk), set)
			}
			flag := os.O_RDONLY
			if m[3] != "" {
				flag = os.O_RDWR
			}
			f, err := os.OpenFile(b.disk[set-1], flag, 0)
			must(err)
			opened = append(opened, f)
			files[number(descriptors.disk)] = f
		case alone && a == "-S":
			continue
		case alone && a == "defer":
			a = fmt.Sprintf("fd:%d", incomingFD)
		}
		args = append(args, a)
	}
	p := &process{cmd: qemu.Program.Command(args...), guest: guest.New(slot.Address, b.token)}
	for n := 3; len(files) > 0; n++ {
		f := files[n]
		if f == nil {
			t.Fatalf("unknown descriptor %d of QEMU: %q", n, b.cmdline)
		}
		p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, f)
		delete(files, n)
	}
	var stderr strings.Builder
	p.cmd.Stderr = &stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	running := false
	p.end = func() {
		p.guest.Close()
		if p.qmp != nil {
			_ = p.qmp.Close()
		}
		if running {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
		for _, f := range opened {
			_ = f.Close()
		}
		if err := errors.Join(h.pool.Release(context.WithoutCancel(t.Context()), slot), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		if t.Failed() && stderr.Len() > 0 {
			t.Logf("QEMU said: %s", stderr.String())
		}
	}
	return func() *process {
		if err := within(slot, p.cmd.Start); err != nil {
			p.end()
			t.Fatal(err)
		}
		running = true
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		p.conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: socket})
		if err == nil {
			p.qmp, err = qmp.NewConn(ctx, p.conn)
		}
		if err != nil {
			p.end()
			t.Fatalf("%v: %s", err, stderr.String())
		}
		return p
	}
}

// within calls f on a thread in a slot's network namespace.
func within(slot *network.Slot, f func() error) (err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	ns, err := os.Open(slot.NetNS())
	if err != nil {
		return err
	}
	defer ns.Close()
	runtime.LockOSThread()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	err = f()
	if e := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); e != nil {
		return errors.Join(err, e) // never unlocked, so the thread ends with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// pipe returns a pipe with the state from which a machine continues.
func pipe(t *testing.T, state []byte) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if len(state) > 64<<10 { // a pipe's capacity
		t.Fatalf("the devices' state has %d bytes", len(state))
	}
	if _, err := w.Write(state); err != nil {
		t.Fatal(err)
	}
	w.Close()
	return r
}

func (p *process) do(t *testing.T, command string, args any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := p.qmp.Execute(ctx, command, args, nil); err != nil {
		t.Fatal(err)
	}
}

type object = map[string]any

// await waits for an event for which is returns true.
func (p *process) await(t *testing.T, name string, is func(json.RawMessage) bool) {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case e, ok := <-p.qmp.Events():
			if !ok {
				t.Fatalf("QEMU ended before its event %s", name)
			}
			if e.Name == name && is(e.Data) {
				return
			}
		case <-late:
			t.Fatalf("QEMU does not send %s", name)
		}
	}
}

// migrated waits for the end of a migration.
func (p *process) migrated(t *testing.T) {
	t.Helper()
	p.await(t, "MIGRATION", func(data json.RawMessage) bool {
		var m struct{ Status string }
		if err := json.Unmarshal(data, &m); err != nil || m.Status == "failed" {
			t.Fatalf("migration: %s %v", data, err)
		}
		return m.Status == "completed"
	})
}

// runs waits until the guest's processors run.
func (p *process) runs(t *testing.T) {
	t.Helper()
	var s struct{ Status string }
	if err := p.qmp.Execute(t.Context(), "query-status", nil, &s); err != nil {
		t.Fatal(err)
	}
	if s.Status != "running" {
		p.await(t, "RESUME", func(json.RawMessage) bool { return true })
	}
}

// answers waits until the guest's daemon responds.
func (p *process) answers(t *testing.T) {
	t.Helper()
	wait(t, p.guest)
}

func wait(t *testing.T, g *guest.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := g.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

// receive makes a machine that waits for commands continue from its incoming state.
func (p *process) receive(t *testing.T) {
	t.Helper()
	p.do(t, "migrate-set-capabilities", object{"capabilities": []object{{"capability": "events", "state": true}}})
	p.do(t, "migrate-incoming", object{"uri": fmt.Sprintf("fd:%d", incomingFD)})
	p.migrated(t)
}

// dump makes QEMU stop the machine and write all of it to a new file. It returns the time
// until that was on the disk, and the size there.
func (p *process) dump(t *testing.T, name string) (took time.Duration, bytes int64) {
	t.Helper()
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p.do(t, "migrate-set-capabilities", object{"capabilities": []object{{"capability": "events", "state": true}}})
	// By default, QEMU writes 128 MiB per second at most.
	p.do(t, "migrate-set-parameters", object{"max-bandwidth": int64(1) << 40})
	// There is no need to wait for the reply: without the descriptor the migration fails.
	if _, _, err := p.conn.WriteMsgUnix([]byte(`{"execute":"getfd","arguments":{"fdname":"dump"},"id":0}`), unix.UnixRights(int(out.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	p.do(t, "stop", nil)
	p.do(t, "migrate", object{"uri": "fd:dump"})
	p.migrated(t)
	if err := out.Sync(); err != nil { // like the agent
		t.Fatal(err)
	}
	took = time.Since(begin)
	var st syscall.Stat_t
	if err := syscall.Fstat(int(out.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return took, st.Blocks * 512
}

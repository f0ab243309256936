package qemu

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

const (
	writerEnv    = "WRENN_QEMU_TEST_WRITER"
	writerBlocks = 64
)

// TestWriter is not a test but the process whose memory TestTrackedPages reads: it maps a
// file as QEMU does, and writes to pages.
func TestWriter(t *testing.T) {
	if os.Getenv(writerEnv) == "" {
		t.Skip("TestTrackedPages starts it")
	}
	mem, err := unix.Mmap(3, 0, writerBlocks*memory.BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	write := func(blocks ...int) {
		for _, b := range blocks {
			mem[b*memory.BlockSize]++
		}
		_, _ = os.Stdout.WriteString("wrote\n")
	}
	write(1, 2)
	_, _ = os.Stdin.Read(make([]byte, 1))
	write(2, 5)
	_, _ = os.Stdin.Read(make([]byte, 1))
}

// TestTrackedPages checks that the driver distinguishes the pages that a process wrote since a
// point in time from those that it had before.
func TestTrackedPages(t *testing.T) {
	f, err := emptyMemory(writerBlocks * memory.BlockSize)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mapped, err := checkMemory(f, writerBlocks*memory.BlockSize)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestWriter$")
	cmd.Env = append(os.Environ(), writerEnv+"=1")
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	said := bufio.NewScanner(out)
	wrote := func() {
		t.Helper()
		for said.Scan() {
			if said.Text() == "wrote" {
				return
			}
		}
		t.Fatal("the writer ended")
	}
	wrote()
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	st := vmm.State{PID: cmd.Process.Pid, StartTime: start, MemoryDevice: mapped.Dev, MemoryInode: mapped.Ino, MemoryBytes: writerBlocks * memory.BlockSize}
	r, err := openRAM(st, os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	blocks := func() (all []uint64) {
		t.Helper()
		for p, err := range r.pages {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, p.Block)
		}
		return all
	}
	given := bytes.Repeat([]byte{9}, memory.BlockSize)
	err = r.write(func(yield func(memory.Page, error) bool) {
		_ = yield(memory.Page{Block: 7, Data: given}, nil) && yield(memory.Page{Block: 8, Data: given}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := blocks(); !slices.Equal(got, []uint64{1, 2, 7, 8}) {
		t.Errorf("the process's own pages are %v", got)
	}
	if r.tracked, err = r.track(); err != nil {
		t.Fatal(err)
	}
	if !r.tracked {
		t.Skip("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
	}
	if got := blocks(); len(got) != 0 {
		t.Errorf("dirty pages without a write: %v", got)
	}
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	wrote()
	if got := blocks(); !slices.Equal(got, []uint64{2, 5}) {
		t.Errorf("dirty pages: %v", got)
	}
	// An agent that takes over sees the same pages, or all own pages if none are tracked.
	for tracked, want := range map[bool][]uint64{true: {2, 5}, false: {1, 2, 5, 7, 8}} {
		st.MemoryTracked = tracked
		r.close()
		if r, err = openRAM(st, os.O_RDONLY); err != nil {
			t.Fatal(err)
		}
		if got := blocks(); !slices.Equal(got, want) {
			t.Errorf("tracked: %v: %v", tracked, got)
		}
	}
}

// TestEmptyMemory checks that nobody can write to the file that a guest's memory maps.
func TestEmptyMemory(t *testing.T) {
	ram, err := emptyMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	if _, err := ram.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("the file is writable: %v", err)
	}
}

func TestFindMapping(t *testing.T) {
	st := vmm.State{MemoryDevice: unix.Mkdev(0, 1), MemoryInode: 42, MemoryBytes: 0x2000}
	for name, test := range map[string]struct {
		maps string
		want int64 // 0 means an error
	}{
		"right":      {"1000-2000 r--p 00000000 08:01 42 /lib\n7000-9000 rw-p 00000000 00:01 42 /memfd:ram (deleted)\n", 0x7000},
		"none":       {"7000-9000 rw-p 00000000 00:01 43 /memfd:ram (deleted)\n", 0},
		"twice":      {"7000-9000 rw-p 00000000 00:01 42\na000-c000 rw-p 00000000 00:01 42\n", 0},
		"too short":  {"7000-8000 rw-p 00000000 00:01 42\n", 0},
		"too long":   {"7000-a000 rw-p 00000000 00:01 42\n", 0},
		"shared":     {"7000-9000 rw-s 00000000 00:01 42\n", 0},
		"read-only":  {"7000-9000 r--p 00000000 00:01 42\n", 0},
		"elsewhere":  {"7000-9000 rw-p 00001000 00:01 42\n", 0},
		"no numbers": {"x-y rw-p 0 00:01 42\n", 0},
		"garbage":    {"what is this\n", 0},
		"empty":      {"", 0},
	} {
		got, err := findMapping(strings.NewReader(test.maps), st)
		if got != test.want || (err == nil) != (test.want != 0) {
			t.Errorf("%s: %#x, %v", name, got, err)
		}
	}
}

func FuzzFindMapping(f *testing.F) {
	f.Add("7000-9000 rw-p 00000000 00:01 42 /memfd:ram (deleted)\n")
	st := vmm.State{MemoryDevice: unix.Mkdev(0, 1), MemoryInode: 42, MemoryBytes: 0x2000}
	f.Fuzz(func(t *testing.T, maps string) {
		if start, err := findMapping(strings.NewReader(maps), st); err == nil && !strings.Contains(maps, "42") {
			t.Errorf("found %#x", start)
		}
	})
}

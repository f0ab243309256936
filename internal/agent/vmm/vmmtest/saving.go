package vmmtest

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
)

func digest(t testing.TB, name string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// writable returns the files in the sandbox's folder that the monitor has open for writing.
func (b *Bench) writable() (all []string) {
	b.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", b.VM.PID())
	entries, err := os.ReadDir(dir)
	b.Must(err)
	for _, e := range entries {
		name, err := os.Readlink(dir + e.Name())
		if err != nil || !strings.HasPrefix(name, b.Spec.Dir) {
			continue
		}
		info, err := os.Lstat(dir + e.Name()) // its mode is that of the descriptor
		if err == nil && info.Mode()&0o200 != 0 {
			all = append(all, name)
		}
	}
	return all
}

// awaitSectors returns a script that waits until the guest's disk has the given size in bytes.
func awaitSectors(bytes int64) string {
	return fmt.Sprintf("until [ $(cat /sys/block/vda/size) = %d ]; do sleep 0.1; done", bytes/512)
}

// save restores a saved machine twice, diverts and grows its disk, and saves and restores it
// again.
func (s *suite) save(t *testing.T) {
	b, saved := s.saved(t)
	// A saved machine can be restored more than once.
	for i := range 2 {
		if i > 0 {
			b.Kill()
			b.Fresh(saved.overlay)
		}
		b.Resume(saved.from(), savedToken, "second")
		b.Sh("sha256sum -c /dev/shm/sum")
		first := b.Number("cat /dev/shm/count")
		if first < saved.count {
			t.Errorf("restore %d: the count decreased from %d to %d", i, saved.count, first)
		}
		b.Sh(fmt.Sprintf("until [ $(cat /dev/shm/count) -gt %d ]; do sleep 0.05; done", first))
	}
	b.Sh("printf 'a mark that only this guest has' >/dev/shm/mark")

	// Divert the disk twice, with a restart of the agent in between.
	former := b.Spec.Overlay
	garbage := filepath.Join(b.Spec.Dir, "garbage")
	b.Must(os.WriteFile(garbage, []byte("no overlay"), 0o600))
	var err error
	for i := range 2 {
		next := filepath.Join(b.Spec.Dir, fmt.Sprintf("diverted-%d", i))
		b.Must(disk.Create(b.Driver.Disks(), next, b.Spec.DiskBytes, b.Spec.UID))
		b.begin = time.Now()
		b.Must(b.VM.Hold(t.Context()))
		// A failed divert leaves the disk unchanged.
		for _, wrong := range []string{absent, garbage} {
			if err := b.VM.Divert(t.Context(), wrong); err == nil {
				t.Fatalf("the disk was diverted to %s", wrong)
			}
		}
		b.Must(b.VM.Divert(t.Context(), next))
		b.took("divert")
		sum := digest(t, former)
		b.Must(b.VM.Run(t.Context()))
		b.Sh(fmt.Sprintf("echo diverted %d >/root/file-%d; sync", i, i))
		if digest(t, former) != sum {
			t.Error("the monitor wrote to the earlier overlay after the disk was diverted")
		}
		b.Spec.Layers, former = append(b.Spec.Layers, former), next

		// Another agent attaches, once to a held machine and once to a running one.
		if i == 0 {
			b.Must(b.VM.Hold(t.Context()))
		}
		s.Forget(b.VM)
		b.VM, err = b.Driver.Attach(t.Context(), b.VM.State())
		b.Must(err)
		b.Must(b.VM.Run(t.Context()))
		b.Sh("true")
	}
	b.Spec.Overlay = former
	for _, name := range b.writable() {
		if name != former {
			t.Errorf("the monitor can still write to %s", name)
		}
	}

	b.Sh(awaitSectors(b.Spec.DiskBytes))
	b.Must(b.VM.Grow(t.Context(), b.Spec.DiskBytes+1<<30))
	b.Sh(awaitSectors(b.Spec.DiskBytes + 1<<30))
	if err := b.VM.Grow(t.Context(), b.Spec.DiskBytes); err == nil {
		t.Error("Grow made a disk smaller")
	}
	b.Spec.DiskBytes += 1 << 30

	// A restore from a base and its changes restores everything.
	next, devices := b.Save(saved.image)
	b.Kill()
	b.Spec.ID = uuid.New()
	b.Resume(vmm.Saved{Memory: saved.ram, Changed: next.ChangedFrom(saved.image), Devices: devices}, "second", "third")
	if got := b.Sh("sha256sum -c /dev/shm/sum >/dev/null && cat /dev/shm/mark /root/file-0 /root/file-1"); got != "a mark that only this guest hasdiverted 0\ndiverted 1" {
		t.Errorf("the restored guest's files have %q", got)
	}
	b.Sh(awaitSectors(b.Spec.DiskBytes))

	if s.Returns {
		return // the rest counts memory that the guest has just freed
	}
	// A guest can use all its memory: the machine's limits allow it, and Memory counts it.
	before, err := b.VM.Memory()
	b.Must(err)
	taken := int64(b.Number(`python3 -c '
free = next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("MemAvailable")) << 10
b = bytearray(free * 8 // 10)
b[::4096] = b"x" * len(b[::4096])
print(len(b))'`))
	after, err := b.VM.Memory()
	b.Must(err)
	if after-before < taken/2 || after > 2*int64(b.Spec.MemoryMiB)<<20+512<<20 {
		t.Errorf("the guest allocated %d bytes; the machine takes %d, and took %d before", taken, after, before)
	}
	b.Kill()
}

// content returns the whole memory of the machine, read from the monitor's process.
func (b *Bench) content() []byte {
	b.Helper()
	st := b.VM.State()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", st.PID))
	b.Must(err)
	defer maps.Close()
	var at int64
	device := fmt.Sprintf(" %02x:%02x %d ", unix.Major(st.MemoryDevice), unix.Minor(st.MemoryDevice), st.MemoryInode)
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		if strings.Contains(lines.Text(), device) {
			start, _, _ := strings.Cut(lines.Text(), "-")
			at, err = strconv.ParseInt(start, 16, 64)
			b.Must(err)
		}
	}
	if at == 0 {
		b.Fatal("the monitor's process does not map the memory")
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", st.PID))
	b.Must(err)
	defer mem.Close()
	all := make([]byte, st.MemoryBytes)
	_, err = mem.ReadAt(all, at)
	b.Must(err)
	return all
}

// compare checks the pages of a held machine against its memory. was is the memory with
// which the machine began, and ram the file of which that was a part. compare returns the
// number of pages, and the number of those that equal was.
func (b *Bench) compare(when string, was []byte, ram io.ReaderAt) (pages, same int) {
	b.Helper()
	is := b.content()
	seen, below := map[uint64]bool{}, make([]byte, memory.BlockSize)
	for p, err := range b.VM.Pages() {
		b.Must(err)
		from := p.Block * memory.BlockSize
		if from >= uint64(len(is)) || seen[p.Block] || !bytes.Equal(p.Data, is[from:from+memory.BlockSize]) {
			b.Fatalf("%s: page %d occurs twice or differs from the guest's memory", when, p.Block)
		}
		seen[p.Block] = true
		if bytes.Equal(p.Data, was[from:from+memory.BlockSize]) {
			same++
		}
	}
	for block := range uint64(len(is) / memory.BlockSize) {
		from := block * memory.BlockSize
		page := is[from : from+memory.BlockSize]
		if seen[block] || bytes.Equal(page, was[from:from+memory.BlockSize]) {
			continue
		}
		if b.subject.Returns { // the guest may have freed it
			_, err := ram.ReadAt(below, int64(from))
			b.Must(err)
			if bytes.Equal(page, below) {
				continue
			}
		}
		b.Fatalf("%s: page %d changed, but Pages does not yield it", when, block)
	}
	b.Logf("%s: %d pages, of which %d are unchanged", when, len(seen), same)
	return len(seen), same
}

// pages compares the pages that a driver yields with the machine's memory, byte by byte:
// before its guest runs, after it ran, and in a machine that was restored with changed pages.
func (s *suite) pages(t *testing.T) {
	b, saved := s.saved(t)
	tracks := b.Driver.TracksMemory()
	t.Logf("the driver tracks memory: %v", tracks)
	base := make([]byte, saved.image.Size())
	_, err := saved.ram.ReadAt(base, 0)
	b.Must(err)

	b.restore(saved.from())
	if !bytes.Equal(b.content(), base) {
		t.Error("a restored machine does not begin with the saved memory")
	}
	if n, _ := b.compare("before it ran", base, saved.ram); n > 256 {
		t.Errorf("%d pages changed before the guest ran", n)
	}
	b.Must(b.VM.Run(t.Context()))
	b.init(savedToken, "second")
	// Write some megabytes that do not change afterwards, and a mark.
	b.Sh("head -c 8000000 /dev/urandom >/dev/shm/more; sha256sum /dev/shm/more >>/dev/shm/sum; printf mark >/dev/shm/mark")
	image, devices := b.Save(saved.image)
	if n, same := b.compare("after it ran", base, saved.ram); n < 1900 || n-same < 1900 || n > len(base)/memory.BlockSize/2 {
		t.Errorf("%d pages, of which %d are unchanged", n, same)
	}
	b.Kill()

	changed := 0
	for p, err := range image.ChangedFrom(saved.image) {
		b.Must(err)
		copy(base[p.Block*memory.BlockSize:], p.Data)
		changed++
	}
	b.Spec.ID = uuid.New()
	b.restore(vmm.Saved{Memory: saved.ram, Changed: image.ChangedFrom(saved.image), Devices: devices})
	if !bytes.Equal(b.content(), base) {
		t.Error("a restored machine does not begin with the saved memory over its base")
	}
	b.compare("restored over its base", base, saved.ram)
	b.Must(b.VM.Run(t.Context()))
	b.init("second", "third")
	b.Sh("printf another >/dev/shm/mark; sha256sum -c /dev/shm/sum")
	image, devices = b.Save(image)
	// The guest has not written to most of the pages over the base.
	if n, same := b.compare("after it ran again", base, saved.ram); tracks && same > changed/2 {
		t.Errorf("%d pages, of which %d are unchanged; %d were over the base", n, same, changed)
	}
	b.Kill()
	b.Spec.ID = uuid.New()
	b.Resume(vmm.Saved{Memory: saved.ram, Changed: image.ChangedFrom(saved.image), Devices: devices}, "third", "fourth")
	if got := b.Sh("sha256sum -c /dev/shm/sum >/dev/null && cat /dev/shm/mark"); got != "another" {
		t.Errorf("the restored guest's mark is %q", got)
	}
}

// rates writes more than the rates allow: at first, after a divert, and after a restore. It
// checks that each time the writes take as long as the rates demand.
func (s *suite) rates(t *testing.T) {
	b := s.NewBench(t)
	b.Spec.Rates = rates.Rates{DiskBytes: 8 << 20, DiskOps: 100, Burst: time.Second}
	b.Boot("first")
	slow := func(when string) {
		t.Helper()
		for _, w := range []struct {
			name, script string
			least        time.Duration // time for the writes beyond the burst
		}{
			// 24 MiB, of which 8 at once.
			{"24 MiB", "dd if=/dev/zero of=/root/blob bs=256k count=96 oflag=direct conv=notrunc 2>&1", 2 * time.Second},
			// 300 operations, of which 100 at once.
			{"300 operations", "dd if=/dev/zero of=/root/blob bs=4k count=300 oflag=direct conv=notrunc 2>&1", 2 * time.Second},
		} {
			begin := time.Now()
			said := b.Sh(w.script)
			// Allow a tenth for the precision of the monitor's timers.
			if took := time.Since(begin); took < w.least*9/10 {
				t.Errorf("%s: %s took %v, less than %v: %s", when, w.name, took, w.least, said)
			}
		}
	}
	slow("at first")

	next := filepath.Join(b.Spec.Dir, "diverted")
	b.Must(disk.Create(b.Driver.Disks(), next, b.Spec.DiskBytes, b.Spec.UID))
	b.Must(b.VM.Hold(t.Context()))
	b.Must(b.VM.Divert(t.Context(), next))
	b.Must(b.VM.Run(t.Context()))
	slow("after the disk was diverted")
	b.Spec.Layers, b.Spec.Overlay = []string{b.Spec.Overlay}, next

	image, devices := b.Save(nil)
	b.Kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.Must(err)
	defer ram.Close()
	b.Fresh(b.Spec.Overlay)
	b.Resume(vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	slow("after a restore")

	// Hold does not wait for a guest that waits for its disk.
	b.Sh(`setsid dd if=/dev/zero of=/root/blob bs=256k count=2000 oflag=direct conv=notrunc >/dev/null 2>&1 &
until grep -q '[1-9]' /sys/block/vda/inflight; do sleep 0.05; done`)
	begin := time.Now()
	b.Must(b.VM.Hold(t.Context()))
	if took, most := time.Since(begin), await.Scale(20*time.Second); took > most {
		t.Errorf("holding a machine whose guest waits for its disk took %v", took)
	}
}

// pauses pauses a guest while its disk and its network card interrupt it. WRENN_TEST_PAUSES is
// the number of pauses (3).
func (s *suite) pauses(t *testing.T) {
	s.NewBench(t).PauseUnderLoad(Count(t, "WRENN_TEST_PAUSES", 3))
}

// load is a script that keeps a guest's disk and network card busy.
const load = `setsid sh -c 'while :; do dd if=/dev/zero of=/root/load bs=4k count=16384 conv=notrunc oflag=direct; done' >/dev/null 2>&1 &
setsid python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9))
while True:
    s.sendto(*s.recvfrom(2048))' >/dev/null 2>&1 &`

// PauseUnderLoad pauses and restores a guest again and again, and checks that each restored
// guest responds and writes to its disk.
func (b *Bench) PauseUnderLoad(pauses int) {
	b.Helper()
	b.Boot("token 0")
	b.Sh(`sync`)
	base, devices := b.Save(nil)
	b.Kill()
	ram, err := base.Materialize(b.Context(), "saved")
	b.Must(err)
	defer ram.Close()

	// A running guest returns each packet.
	conn, err := net.Dial("udp", net.JoinHostPort(b.Slot.Address.String(), "9"))
	b.Must(err)
	defer conn.Close()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(20 * time.Millisecond) // real time: the rate of the packets
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_, _ = conn.Write(make([]byte, 400)) // refused before the guest listens
			case <-stop:
				return
			}
		}
	}()
	defer func() { close(stop); <-stopped }()

	image := base
	for i := range pauses {
		b.Resume(vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(i), "token "+strconv.Itoa(i+1))
		if i == 0 {
			b.Sh(load)
		}
		b.Sh(`n=$(cat /root/n 2>/dev/null || echo 0); echo $((n+1)) >/root/n; sync /root/n`)
		former, formerDir := image, b.dir
		b.dir = b.TempDir()
		image, devices = b.Save(image)
		b.Kill()
		if former != base { // hundreds of images would be too many files, and fill the disk
			b.Must(errors.Join(former.Close(), os.RemoveAll(formerDir)))
		}
		b.Logf("pause %d of %d", i+1, pauses)
	}
	defer image.Close()
	b.Resume(vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices}, "token "+strconv.Itoa(pauses), "end")
	if n := b.Number("cat /root/n"); n != pauses {
		b.Errorf("the guest wrote %d times, want %d", n, pauses)
	}
}

package qemu

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/launcher"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// withBalloon is the driver under test, whose guests return memory or not.
func withBalloon(balloon bool) vmmtest.Subject {
	s := subject
	s.Returns = balloon
	s.New = func(dir string, log *slog.Logger) (vmm.Driver, error) {
		d, err := Open(vmmtest.Accelerator(), vmm.Config{Dir: dir, Balloon: balloon, Log: log})
		if err != nil {
			return nil, err
		}
		d.starts = await.Scale(startTimeout)
		return d, nil
	}
	return s
}

// TestLibrary runs fallocate(1) with the library. A hole in a sealed file must succeed and
// change nothing; all other calls must do the same as without the library.
func TestLibrary(t *testing.T) {
	lib, err := newLibrary()
	if err != nil {
		t.Fatal(err)
	}
	defer lib.Close()
	data := bytes.Repeat([]byte("data"), 4096)
	sealed, err := launcher.Sealed("sealed", data, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer sealed.Close()
	unsealed, err := memfd("unsealed") // it cannot be sealed
	if err != nil {
		t.Fatal(err)
	}
	defer unsealed.Close()
	plain, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	for _, f := range []*os.File{unsealed, plain} {
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	content := func(f *os.File) []byte {
		t.Helper()
		b := make([]byte, len(data))
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		return b
	}
	call := func(f *os.File, args ...string) string {
		t.Helper()
		cmd := exec.Command("fallocate", append(args, "/proc/self/fd/3")...)
		cmd.ExtraFiles = []*os.File{f, lib}
		cmd.Env = append(os.Environ(), preload(4), "LC_ALL=C")
		out, err := cmd.CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Fatal(err)
		}
		return string(out)
	}
	hole := []string{"--punch-hole", "--offset=4096", "--length=4096"}
	if out := call(sealed, hole...); out != "" || !bytes.Equal(content(sealed), data) {
		t.Errorf("a hole in a sealed file: %s; the file changed: %v", out, !bytes.Equal(content(sealed), data))
	}
	if out := call(sealed, "--length=999999"); !strings.Contains(out, "not permitted") {
		t.Errorf("a sealed file grew: %s", out)
	}
	punched := bytes.Clone(data)
	clear(punched[4096:8192])
	for _, f := range []*os.File{unsealed, plain} {
		if out := call(f, hole...); out != "" || !bytes.Equal(content(f), punched) {
			t.Errorf("a hole in the file %s: %s; it is there: %v", f.Name(), out, bytes.Equal(content(f), punched))
		}
		if out := call(f, "--length=65536"); out != "" {
			t.Errorf("the file %s did not grow: %s", f.Name(), out)
		}
		if info, err := f.Stat(); err != nil || info.Size() != 65536 {
			t.Errorf("the file %s: %v, %v", f.Name(), info, err)
		}
	}
}

// TestFreedMemoryReturns lets a restored guest take memory and free it. The machine must then
// take less of the host's memory, and a save must be smaller.
func TestFreedMemoryReturns(t *testing.T) {
	const bytes = 64 << 20
	balloons := []bool{true}
	if os.Getenv("WRENN_SLOW") != "" {
		balloons = []bool{true, false} // for comparison
	}
	for _, balloon := range balloons {
		name := "with"
		if !balloon {
			name = "without"
		}
		t.Run(name, func(t *testing.T) {
			b := withBalloon(balloon).NewBench(t)
			b.Boot("first")
			b.Sh(vmmtest.Counting + "; mount -t tmpfs -o size=80% freed /mnt")
			base, devices := b.Save(nil)
			kind := b.VM.State().Kind
			b.Kill()
			if strings.Contains(kind, balloonMark) != balloon || kind != b.Driver.Kind(false) {
				t.Errorf("the machine's kind is %q", kind)
			}
			ram, err := base.Materialize(t.Context(), "base")
			b.Must(err)
			defer ram.Close()

			b.Spec.ID = uuid.New()
			b.Resume(vmm.Saved{Memory: ram, Devices: devices, Kind: kind}, "first", "second")
			takes := func() int64 {
				select {
				case <-b.VM.Done():
					b.Must(b.VM.Err())
				default:
				}
				n, err := b.VM.Memory()
				b.Must(err)
				return n
			}
			before := takes()
			b.Sh("head -c 64M /dev/urandom >/mnt/freed")
			full := takes()
			if full-before < bytes*9/10 {
				t.Errorf("the guest took %d bytes, but the machine takes %d, before %d", bytes, full, before)
			}
			b.Sh("rm /mnt/freed")
			if balloon {
				// Not all of it, because the guest only reports blocks of 2 MiB.
				await.Until(t, "the machine takes less of the host's memory", func() bool { return takes() < full-bytes/4 })
			}
			now := takes()
			image, devices := b.Save(base)
			b.Kill()
			changed := 0
			for _, err := range image.ChangedFrom(base) {
				b.Must(err)
				changed++
			}
			t.Logf("the guest took and freed %d MiB: the machine took %d MiB, then %d, and then %d; %d pages (%d MiB) were saved",
				bytes>>20, before>>20, full>>20, now>>20, changed, changed*memory.BlockSize>>20)
			// Some pages that the guest uses itself changed too.
			if most := int(bytes+16<<20-(full-now)) / memory.BlockSize; changed > most {
				t.Errorf("%d pages were saved, want %d at most", changed, most)
			}

			// The rest of the guest is as it was, and it can use the memory again.
			b.Spec.ID = uuid.New()
			b.Resume(vmm.Saved{Memory: ram, Changed: image.ChangedFrom(base), Devices: devices, Kind: kind}, "second", "third")
			if got := b.VM.State().Kind; got != kind {
				t.Errorf("the machine was restored as %q, and saved as %q", got, kind)
			}
			b.Sh("sha256sum -c /dev/shm/sum; head -c 64M /dev/zero >/mnt/again; head -c 64M /dev/zero | cmp - /mnt/again")
		})
	}
}

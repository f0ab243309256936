package qemu

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// TestBarriersAreKept checks the code that QEMU generates for a guest's memory barriers
// on a machine with one processor. Without them, a virtio queue can stall for good, once
// in some hundred thousand notifications.
func TestBarriersAreKept(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("reads the code of an amd64 host")
	}
	subject.Open(t) // skips where QEMU is missing
	dir := t.TempDir()
	// Linux's smp_mb() and MFENCE, then a halt, as a boot sector.
	sector := make([]byte, 512)
	copy(sector, []byte{
		0xf0, 0x83, 0x06, 0x00, 0x05, 0x00, // lock addw $0, 0x500
		0x0f, 0xae, 0xf0, // mfence
		0xf4, // hlt
	})
	sector[510], sector[511] = 0x55, 0xaa
	disk, log := filepath.Join(dir, "disk"), filepath.Join(dir, "log")
	if err := os.WriteFile(disk, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), await.Scale(60*time.Second))
	defer cancel()
	cmd := Program.CommandContext(ctx, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc",
		"-accel", TCG, "-smp", processors(models[TCG][0], 1),
		"-drive", "format=raw,file="+disk, "-d", "in_asm,out_asm", "-dfilter", "0x7c00+0x100", "-D", log)
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	// The first barrier is in a helper that the code calls, or in the code; the second is
	// one of the host's barriers.
	translated := regexp.MustCompile(`(?s)0x0*7c00.*OUT:.*\n\n`)
	kept := regexp.MustCompile(`(?s)OUT:.*(call|lock (add|xadd)).*(lock or|mfence)`)
	var code []byte
	await.Until(t, "QEMU translates the boot sector", func() bool {
		code, _ = os.ReadFile(log)
		return translated.Match(code)
	})
	if !kept.Match(code) {
		t.Errorf("QEMU omits the guest's barriers:\n%s", code)
	}
}

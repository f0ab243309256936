package qemu

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestProbeIsRemembered checks that the probe remembers an answer of QEMU or the guest,
// and forgets one that a timeout may have made wrong.
func TestProbeIsRemembered(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip("needs /dev/kvm")
	}
	if _, err := os.Stat(Program.File); err != nil {
		t.Skip("needs QEMU")
	}
	dir := t.TempDir()
	kernel, initrd := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd")
	for _, name := range []string{kernel, initrd} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key, err := probeKey(kernel, initrd)
	if err != nil {
		t.Fatal(err)
	}
	works := func() error { return KVMWorks(t.Context(), vmm.Config{Dir: dir, Kernel: kernel, Initrd: initrd}) }
	for _, c := range []struct {
		name string
		why  error
		kept bool
		want string
	}{
		{"works", nil, true, ""},
		{"QEMU's error", brokenError{errors.New("internal error")}, true, "internal error"},
		{"a timeout", context.DeadlineExceeded, false, ""},
		{"another timeout", errors.New("printed nothing"), false, ""},
		{"works again", nil, true, ""},
	} {
		if err := remember(dir, key, c.why); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		_, err := os.Stat(verdictFile(dir))
		if kept := !errors.Is(err, fs.ErrNotExist); kept != c.kept {
			t.Fatalf("%s: remembered is %v", c.name, kept)
		}
		if !c.kept {
			continue
		}
		if got := works(); c.want == "" && got != nil || c.want != "" && (got == nil || got.Error() != c.want) {
			t.Errorf("%s: KVMWorks is %v", c.name, got)
		}
	}
}

// TestProbe boots a kernel under this machine's KVM, which may or may not work. The record must
// have the probe's answer, or nothing if a timeout may have made the answer wrong.
func TestProbe(t *testing.T) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skip("needs /dev/kvm")
	}
	subject.Open(t) // skips where virtual machines cannot run
	in := imagetest.Prepare(t)
	dir := t.TempDir()
	err := probeKVM(t.Context(), vmm.Config{Dir: dir, Kernel: in.Kernel.Vmlinux, Initrd: in.Kernel.Initrd, Log: vmmtest.Log(t)})
	t.Logf("KVM here: %v", err)
	v, readErr := readVerdict(dir)
	switch {
	case err == nil:
		if readErr != nil || v.Why != "" {
			t.Errorf("the record is %+v, %v", v, readErr)
		}
	case errors.As(err, new(brokenError)):
		if readErr != nil || v.Why != err.Error() {
			t.Errorf("the record is %+v, %v", v, readErr)
		}
	default:
		if !errors.Is(readErr, fs.ErrNotExist) {
			t.Errorf("the probe remembered an answer: %+v, %v", v, readErr)
		}
	}
	// The probe leaves no files.
	if left, _ := filepath.Glob(filepath.Join(dir, "probe-*")); len(left) > 0 {
		t.Errorf("the probe left %v", left)
	}
}

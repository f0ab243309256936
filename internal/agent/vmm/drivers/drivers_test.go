package drivers

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// fake is a monitor that works or does not.
type fake struct {
	name, accel string
	broken      error
	again       *bool // whether it was probed again
}

func (f fake) Name() string        { return f.name }
func (f fake) Accelerator() string { return f.accel }

func (f fake) Works(_ context.Context, _ vmm.Config, again bool) error {
	if f.again != nil {
		*f.again = again
	}
	return f.broken
}

func (f fake) Open(vmm.Config) (vmm.Driver, error) {
	return fakeDriver{name: f.name, accel: f.accel}, nil
}

type fakeDriver struct {
	vmm.Driver
	name, accel string
}

func TestOpen(t *testing.T) {
	no := errors.New("no")
	var again bool
	third, kvm, tcg := fake{"third", vmm.KVM, no, &again}, fake{"qemu", vmm.KVM, nil, nil}, fake{"qemu", vmm.TCG, nil, nil}
	brokenKVM := kvm
	brokenKVM.broken = no
	c := vmm.Config{Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, test := range []struct {
		all         []vmm.Monitor
		accel, want string
	}{
		{[]vmm.Monitor{third, kvm, tcg}, Auto, "qemu kvm"},
		{[]vmm.Monitor{third, brokenKVM, tcg}, Auto, "qemu tcg"},
		// An accelerator that the caller names is not probed.
		{[]vmm.Monitor{third, kvm, tcg}, vmm.KVM, "third kvm"},
		{[]vmm.Monitor{third, kvm, tcg}, vmm.TCG, "qemu tcg"},
		{[]vmm.Monitor{third, kvm}, vmm.TCG, ""},
		{[]vmm.Monitor{third}, Auto, ""},
		{[]vmm.Monitor{tcg}, "hvf", ""},
	} {
		d, err := open(t.Context(), test.all, test.accel, c)
		got := ""
		if err == nil {
			got = d.(fakeDriver).name + " " + d.(fakeDriver).accel
		}
		if got != test.want || (err == nil) == (test.want == "") {
			t.Errorf("%v, %s: %q, %v", test.all, test.accel, got, err)
		}
	}
	if name, err := probe(t.Context(), []vmm.Monitor{third, kvm}, vmm.KVM, c); name != "qemu" || err != nil || !again {
		t.Errorf("probed %q, %v, again: %v", name, err, again)
	}
	if _, err := probe(t.Context(), []vmm.Monitor{third, tcg}, vmm.KVM, c); !errors.Is(err, no) {
		t.Errorf("probed: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(ctx, []vmm.Monitor{third, tcg}, Auto, c); !errors.Is(err, context.Canceled) {
		t.Errorf("opened although the context was cancelled: %v", err)
	}
}

// TestAll checks that each monitor has a name and an accelerator, and is listed once.
func TestAll(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range all {
		key := m.Name() + " " + m.Accelerator()
		if seen[key] || m.Name() == "" || m.Accelerator() != vmm.KVM && m.Accelerator() != vmm.TCG {
			t.Errorf("%q is listed twice, or has no name or accelerator", key)
		}
		seen[key] = true
	}
}

package qemu

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestForeignCalls checks that all system calls of 32-bit programs fail, because their numbers
// mean other calls.
func TestForeignCalls(t *testing.T) {
	for _, accel := range []string{KVM, TCG} {
		all, err := filters(accel)
		if err != nil {
			t.Fatal(err)
		}
		if got := action(t, all[0], unix.AUDIT_ARCH_X86_64, unix.SYS_READ); got != unix.SECCOMP_RET_ALLOW {
			t.Errorf("%s: the action on read is %#x", accel, got)
		}
		for call := range uint32(512) {
			if got := action(t, all[0], unix.AUDIT_ARCH_I386, call); got != unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS) {
				t.Errorf("%s: the action on call %d of a 32-bit program is %#x", accel, call, got)
			}
		}
	}
}

// action returns what the kernel does with a call without arguments.
func action(t *testing.T, filter []unix.SockFilter, arch, call uint32) uint32 {
	t.Helper()
	raw := make([]bpf.RawInstruction, len(filter))
	for i, f := range filter {
		raw[i] = bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	program, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the filter has invalid instructions")
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	// struct seccomp_data, in the byte order that the VM reads.
	data := binary.BigEndian.AppendUint32(nil, call)
	data = binary.BigEndian.AppendUint32(data, arch)
	data = append(data, make([]byte, 56)...)
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

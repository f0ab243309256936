package image_test

import (
	"context"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
)

// TestBoot boots kernel, initrd and minimal under a bare QEMU, whose own user
// mode network stands for a slot, until the guest daemon answers.
func TestBoot(t *testing.T) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64")
	}
	in := imagetest.Prepare(t)
	overlay := filepath.Join(t.TempDir(), "overlay.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", in.Minimal.Rootfs, overlay).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()

	var console strings.Builder
	cmd := exec.Command("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "512", "-smp", "1",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", in.Kernel.Vmlinux, "-initrd", in.Kernel.Initrd, "-append", guest.Cmdline("boot-test"),
		"-drive", "id=root,file="+overlay+",format=qcow2,if=none", "-device", "virtio-blk-device,drive=root",
		"-netdev", "user,id=net,net=169.254.0.20/30,host=169.254.0.22,dhcpstart=169.254.0.21,dns=169.254.0.23,hostfwd=tcp:"+addr+"-169.254.0.21:49983",
		"-device", "virtio-net-device,netdev=net,mac="+guest.MAC, "-device", "virtio-rng-device")
	cmd.Stdout, cmd.Stderr = &console, &console
	started := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill(); <-ended }()

	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	client := &http.Client{Timeout: time.Second}
	for {
		resp, err := client.Get("http://" + addr + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusNoContent {
				break
			}
		}
		select {
		case <-ended:
			t.Fatalf("QEMU ended: %s", console.String())
		case <-ctx.Done():
			_ = cmd.Process.Kill()
			<-ended
			t.Fatalf("the guest daemon does not answer (%v): %s", err, console.String())
		case <-time.After(50 * time.Millisecond): // nothing tells when a guest listens
		}
	}
	t.Logf("guest daemon answered %v after QEMU's start", time.Since(started).Round(time.Millisecond))
	_ = cmd.Process.Kill()
	<-ended
	t.Log(console.String())
}

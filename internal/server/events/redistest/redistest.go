// Package redistest runs a real Redis for tests, on a unix socket.
package redistest

import (
	"bufio"
	"errors"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// Start runs a Redis that listens on socket until the test ends or the caller calls stop.
// It skips the test if Redis is not installed.
func Start(t testing.TB, socket string) (stop func()) {
	t.Helper()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("Redis is not installed")
	}
	cmd := exec.Command(bin, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", filepath.Dir(socket))
	// The kernel kills Redis if the test binary dies.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// The death signal is tied to the thread that forked, so keep the thread.
		runtime.LockOSThread()
		defer close(ended)
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		ready := sync.OnceFunc(func() { started <- nil })
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.Contains(strings.ToLower(lines.Text()), "ready to accept connections") {
				ready()
			}
		}
		_ = cmd.Wait()
		select {
		case started <- errors.New("redis ended before it was ready"):
		default:
		}
	}()
	if err := await.Recv(t, "Redis starts", started); err != nil {
		t.Fatalf("start Redis: %v", err)
	}
	stop = func() {
		_ = cmd.Process.Kill()
		<-ended
	}
	t.Cleanup(stop)
	return stop
}

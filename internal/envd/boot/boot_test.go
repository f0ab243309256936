package boot

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestOptions(t *testing.T) {
	got := options("console=ttyS0 quiet root=/dev/vda wrenn.ip=169.254.0.21/30 a=b=c\n")
	for k, want := range map[string]string{"console": "ttyS0", "root": "/dev/vda", "wrenn.ip": "169.254.0.21/30", "a": "b=c", "quiet": ""} {
		if got[k] != want {
			t.Errorf("%s is %q, not %q", k, got[k], want)
		}
	}
}

func FuzzOptions(f *testing.F) {
	f.Add("a=b c")
	f.Fuzz(func(_ *testing.T, s string) { options(s) })
}

func TestAwaitFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda")
	if err := awaitFile(path, 10*time.Millisecond); err == nil {
		t.Error("a file that is not there was found")
	}
	done := make(chan error, 1)
	go func() { done <- awaitFile(path, 10*time.Second) }()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

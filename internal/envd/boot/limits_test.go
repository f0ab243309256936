package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestSettings(t *testing.T) {
	for memory, want := range map[uint64]string{128 << 20: "32768", 2 << 30: "524288", 64 << 30: "524288"} {
		for _, s := range settings(memory) {
			if s.name == "fs/inotify/max_user_watches" && s.value != want {
				t.Errorf("with %d bytes of memory: %s watches, not %s", memory, s.value, want)
			}
		}
	}
}

func TestShareTemporary(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"tmp", "var/tmp"} {
		if err := shareTemporary(root); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := shareTemporary(root); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"tmp", "var/tmp"} {
			if info, err := os.Stat(filepath.Join(root, name)); err != nil || info.Mode() != os.ModeDir|os.ModeSticky|0o777 {
				t.Errorf("/%s: %v, %v", name, info.Mode(), err)
			}
		}
	}
}

package machine

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestExport(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	for _, dir := range []string{etc, filepath.Join(root, "bin")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m := &Machine{etc: etc}
	if err := m.Export(map[string]string{"A": "b"}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(etc); err != nil || len(left) > 0 {
		t.Errorf("an image without a shell has %v, %v", left, err)
	}
	if err := os.Symlink("/bin/sh", filepath.Join(root, "bin/sh")); err != nil {
		t.Fatal(err)
	}
	if err := m.Export(nil); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(etc); err != nil || len(left) > 0 {
		t.Errorf("without an environment there are %v, %v", left, err)
	}
	if err := os.WriteFile(filepath.Join(etc, "environment"), []byte("MINE=1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(etc, "sudoers.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	envs := map[string]string{"PATH": "/opt/tool/bin:/bin:/usr/bin", "NAME": "it's\na $HOME `x`", "SET": "sandbox's", "odd-name": "x", "HASH": "a#b", "JSON": `{"a": 'b\\'}`}
	for range 2 { // a repetition changes nothing
		if err := m.Export(envs); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(etc, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	if got, want := read("environment"), "MINE=1\n"+ownBegin+"\nPATH=/opt/tool/bin:/bin:/usr/bin\n"+ownEnd+"\n"; got != want {
		t.Errorf("/etc/environment is %q, not %q", got, want)
	}
	if got, want := read("sudoers.d/zz-wrenn.env"), "JSON=\"{\"a\": 'b\\\\'}\"\nPATH=\"/opt/tool/bin:/bin:/usr/bin\"\nSET=\"sandbox's\"\n"; got != want {
		t.Errorf("sudo's environment is %q, not %q", got, want)
	}
	if info, err := os.Stat(filepath.Join(etc, "sudoers.d/zz-wrenn")); err != nil || info.Mode() != 0o440 {
		t.Errorf("for sudo: %v, %v", info, err)
	}
	if !strings.Contains(read("profile"), "/etc/profile.d/*.sh") {
		t.Error("an image without a profile did not get one")
	}
	// What a login shell gets.
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `PATH=/reset; . "$0"; echo "$PATH|$NAME|$SET|"`, filepath.Join(etc, "profile.d/zz-wrenn.sh"))
	cmd.Env = []string{"PATH=/bin:/usr/bin", "SET=request's"}
	out, err := cmd.CombinedOutput()
	if want := "/opt/tool/bin:/bin:/usr/bin|it's\na $HOME `x`|request's|\n"; err != nil || string(out) != want {
		t.Errorf("a login shell gets %q, not %q: %v", out, want, err)
	}
	// An empty environment removes everything of the previous one.
	if err := m.Export(map[string]string{}); err != nil {
		t.Fatal(err)
	}
	if got := read("environment"); got != "MINE=1\n" {
		t.Errorf("/etc/environment is %q", got)
	}
	if got := read("profile.d/zz-wrenn.sh"); strings.Contains(got, "NAME") {
		t.Errorf("these are left: %q", got)
	}
}

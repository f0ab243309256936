package agent_test

import (
	"archive/tar"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/uuid"

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
		ocitest.File("opt/tool/bin/mytool", "#!/bin/sh\necho \"tool has $FROM $GIVEN\"\n").With(mode(0o755)),
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
	img := ocitest.Build(t, ocitest.Archive(t, entries))
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.Config = v1.Config{
		Env: []string{"PATH=/opt/tool/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FROM=the image"},
		Cmd: []string{"/bin/sh"},
	}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

// TestAlpineMachine checks, in a sandbox of an image without Debian's programs, that the
// image's environment reaches every process and that the kernel modules are there.
func TestAlpineMachine(t *testing.T) {
	h := newHost(t)
	const password = "password"
	ref, err := name.ParseReference(ocitest.Registry(t, "reader", password) + "/alpine:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, alpine(t), remote.WithAuth(&authn.Basic{Username: "reader", Password: password}), remote.WithContext(t.Context())); err != nil {
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
	says(t, "start cron", "root", `for u in root user; do echo '* * * * * mytool >/tmp/'$u >/var/spool/cron/crontabs/$u || exit; done; date -s @$(($(date +%s)/60*60+58)) >/dev/null && crond && echo started`, "started\n")

	t.Run("environment", func(t *testing.T) {
		says(t, "exec", "user", "mytool", "tool has the image \n")
		says(t, "login shell", "user", "GIVEN=request sh -l -c mytool", "tool has the image request\n")
		says(t, "own value", "user", "FROM=request sh -l -c mytool", "tool has request \n")
		says(t, "login without a start", "root", "su - user -c mytool", "tool has the image \n")
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
	says(t, "mounts", "user", "grep -c ' / ext4 ' /etc/mtab", "1\n")
	t.Run("modules", func(t *testing.T) {
		says(t, "modprobe", "root", "readlink /sbin/modprobe; modprobe nbd nbds_max=2 && ls /dev/nbd*", "/usr/local/bin/envd\n/dev/nbd0\n/dev/nbd1\n")
		says(t, "on demand", "root", "ip link add name br0 type bridge 2>&1 && cat /sys/class/net/br0/bridge/stp_state", "0\n")
		says(t, "for a user", "user", "head -c 0 /dev/net/tun; grep -c ^tun /proc/modules", "1\n")
		says(t, "a missing one", "root", "modprobe no-such-module 2>&1 | grep -c 'not found'; modprobe -q no-such-module 2>&1; echo $?", "1\n1\n")
		// BusyBox's own modprobe, as the kernel starts it.
		says(t, "of BusyBox", "root", "ln -sf /bin/busybox /sbin/modprobe && mkdir /m && mount -t binfmt_misc b /m 2>&1 && cat /m/status", "enabled\n")
	})
	t.Run("cron", func(t *testing.T) {
		for _, user := range []string{"root", "user"} {
			await.Until(t, "cron runs the job of "+user, func() bool {
				return string(h.exec(t, sandbox, sh("cat /tmp/"+user), nil).GetStdout()) == "tool has the image \n"
			})
		}
	})
}

package agent_test

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// debianCron is the folder with the package that fetchCron downloads.
func debianCron(in imagetest.Images) string { return filepath.Join(string(in.Dir), "cron") }

// fetchCron downloads Debian's cron, which minimal lacks (80 KB), unless it is there.
func fetchCron(t *testing.T, dir string) error {
	if had, _ := filepath.Glob(filepath.Join(dir, "*.deb")); len(had) > 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(t.Context(), "apt-get", "download", "--quiet", "cron")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// TestMachine checks that a guest behaves like an ordinary Linux machine.
func TestMachine(t *testing.T) {
	h := newHost(t)
	r := request()
	r.Envs = agenttest.Awkward()
	maps.Copy(r.Envs, map[string]string{"FROM": "the sandbox", "HOME": "/srv", "PATH": "/opt/tool/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
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

	t.Run("limits", func(t *testing.T) {
		for what, c := range map[string]struct{ script, want string }{
			"open files":      {"ulimit -Sn; ulimit -Hn", "1024\n1048576\n"},
			"a low port":      {"python3 -c 'import socket; print(socket.create_server((\"\",80)).getsockname()[1])'", "80\n"},
			"ping":            {"python3 -c 'import socket; socket.socket(2,2,1); print(\"ping\")'", "ping\n"},
			"inotify watches": {"test $(cat /proc/sys/fs/inotify/max_user_watches) -ge 50000 && echo many", "many\n"},
			"pids and maps":   {"cat /proc/sys/kernel/pid_max /proc/sys/vm/max_map_count", "4194304\n262144\n"},
			"temporary files": {"stat -c %a /tmp /var/tmp", "1777\n1777\n"},
			"localhost":       {"python3 -c 'import socket; print(*[socket.getaddrinfo(\"localhost\", 1, f)[0][4][0] for f in (socket.AF_INET, socket.AF_INET6)])'", "127.0.0.1 ::1\n"},
			"own name":        {"getent ahostsv4 $(hostname) | head -1 | cut -d' ' -f1", "127.0.1.1\n"},
			"language":        {"echo $LANG", "C.UTF-8\n"},
		} {
			says(t, what, "", c.script, c.want)
		}
	})
	t.Run("environment", func(t *testing.T) {
		says(t, "make a tool", "root", `mkdir -p /opt/tool/bin && printf '#!/bin/sh\necho "tool has $FROM $GIVEN"\n' >/opt/tool/bin/mytool && chmod +x /opt/tool/bin/mytool`, "")
		for what, c := range map[string]struct{ user, script, want string }{
			"exec":                  {"", "mytool", "tool has the sandbox \n"},
			"login shell":           {"", "GIVEN=request bash -l -c mytool", "tool has the sandbox request\n"},
			"own value":             {"", "FROM=request bash -l -c mytool", "tool has request \n"},
			"login without a start": {"root", "su - user -c mytool", "tool has the sandbox \n"},
			"sudo":                  {"", "sudo mytool", "tool has the sandbox \n"},
			"sudo's login":          {"", "sudo -i mytool", "tool has the sandbox \n"},
			"sudo in a login shell": {"", "bash -l -c 'sudo mytool'", "tool has the sandbox \n"},
			"a login's own home":    {"root", "su - user -c 'pwd; echo $HOME'", "/home/user\n/home/user\n"},
		} {
			says(t, what, c.user, c.script, c.want)
		}
		want := maps.Clone(r.GetEnvs())
		delete(want, "HOME")
		for what, c := range map[string]struct {
			user, script string
			without      []string
		}{
			"exec":                          {"", "env -0", nil},
			"login shell":                   {"", "bash -l -c 'env -0'", nil},
			"login shell sh":                {"", "sh -l -c 'env -0'", nil},
			"login shell without a start":   {"", "env -i bash -l -c 'env -0'", nil},
			"login shell sh without one":    {"", "env -i sh -l -c 'env -0'", nil},
			"su -":                          {"root", "su - user -c 'env -0'", nil},
			"su - to sh":                    {"root", "env -i su - user -s /bin/sh -c 'env -0'", nil},
			"su":                            {"root", "su user -c 'env -0'", nil},
			"sudo":                          {"", "sudo env -0", nil},
			"sudo -i":                       {"", "sudo -i env -0", nil},
			"sudo -u":                       {"root", "sudo -u user env -0", nil},
			"sudo without an environment":   {"", `env -i "PATH=$PATH" sudo env -0`, agenttest.Inexpressible},
			"pam_env, which cron uses, too": {"root", "env -i su user -s /bin/sh -c 'env -0'", agenttest.Inexpressible},
		} {
			command := sh(c.script)
			command.User = c.user
			got := h.exec(t, sandbox, command, nil)
			agenttest.CheckEnvironment(t, what, got.GetStdout(), want, c.without...)
			if len(got.GetStderr()) > 0 {
				t.Errorf("%s: %s", what, got.GetStderr())
			}
		}
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: &pb.Command{Cmd: "bash", Args: []string{"-l", "-i", "-c", "mytool; echo $TERM"}}, Terminal: &pb.TerminalSize{Cols: 80, Rows: 24}})
		defer cancel()
		var seen strings.Builder
		for {
			m, err := s.Receive()
			if err != nil || m.GetExited() != nil {
				break
			}
			seen.Write(m.GetTerminal())
		}
		if !strings.Contains(seen.String(), "tool has the sandbox") || !strings.Contains(seen.String(), "xterm") {
			t.Errorf("a terminal shows %q", seen.String())
		}
	})
	t.Run("commands", func(t *testing.T) {
		for cmd, want := range map[string]struct{ message, reason string }{
			"no-such-command": {"no-such-command: command not found", hostwire.CommandNotFound},
			"/etc":            {"/etc: Is a directory", hostwire.CommandNotExecutable},
		} {
			_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: cmd}}))
			if e, ok := err.(*connect.Error); !ok || e.Message() != want.message || e.Meta().Get(hostwire.ErrorReason) != want.reason {
				t.Errorf("%s: %v", cmd, err)
			}
		}
	})
	t.Run("listening ports", func(t *testing.T) {
		// envd looks for servers by itself only every 10 s.
		says(t, "a bridge for a new server", "", `python3 -c '
import socket, time
def bridged(port):
    with socket.create_server(("127.0.0.1", port)):
        begun = time.monotonic()
        while socket.socket().connect_ex(("169.254.0.21", port)):
            time.sleep(0.01)
        return time.monotonic() - begun
print(min(map(bridged, range(8100, 8105))) < 5)'`, "True\n")
	})
	t.Run("IPv6", func(t *testing.T) {
		says(t, "addresses", "", "awk '{print $1, $6}' /proc/net/if_inet6", "00000000000000000000000000000001 lo\n")
		// Without a route to the internet, connections fail at once.
		says(t, "the internet", "", `python3 -c '
import socket
s = socket.socket(socket.AF_INET6)
s.settimeout(60)
try:
    s.connect(("2001:db8::1", 80))
except OSError as e:
    print(e.strerror)'`, "Network is unreachable\n")
		const serve = `import http.server, socket, sys
class S(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(sys.argv[3]))
        super().server_bind()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[1].encode())
S((sys.argv[1], int(sys.argv[2])), H).serve_forever()`
		for port, args := range map[int]string{8001: "::1 8001 1", 8002: ":: 8002 1", 8003: ":: 8003 0"} {
			h.exec(t, sandbox, sh("nohup python3 -c '"+serve+"' "+args+" >/dev/null 2>&1 &"), nil)
			begun := time.Now()
			await.Until(t, "a server at "+args+" answers", func() bool {
				code, body := h.get(t, h.url(sandbox, port, "/"), nil)
				return code == http.StatusOK && body == strings.Fields(args)[0]
			})
			t.Logf("a server at %s answered %v after it was started", args, time.Since(begun))
		}
	})
	t.Run("cron", func(t *testing.T) {
		packages, _ := filepath.Glob(filepath.Join(debianCron(h.Images), "*.deb"))
		if len(packages) == 0 {
			t.Skip("needs Debian's cron, which TestImages could not download")
		}
		cron, err := os.ReadFile(packages[0])
		if err != nil {
			t.Fatal(err)
		}
		// Debian's cron gives jobs a PATH of its own, so the second job reads the sandbox's from
		// the file that login shells read. The jobs start when the next minute begins, which the
		// guest's clock says is near; chronyd would correct it.
		c := sh(`set -e
dpkg-deb --fsys-tarfile /dev/stdin | tar -x --keep-directory-symlink -C / && mkdir -p /var/spool/cron/crontabs && cd /var/spool/cron/crontabs
for u in root user; do
	printf '* * * * * env -0 >/tmp/%s.part && mv /tmp/%s.part /tmp/%s.job\n* * * * * . /etc/profile.d/zz-wrenn.sh; env -0 >/tmp/%s.more && mv /tmp/%s.more /tmp/%s.login\n' $u $u $u $u $u $u >$u
	chmod 600 $u && chown $u $u
done
pkill chronyd && date -s @$(($(date +%s)/60*60+58)) >/dev/null && cron`)
		c.User = "root"
		if got := h.exec(t, sandbox, c, cron); got.GetExitCode() != 0 {
			t.Fatalf("start cron: %s", got.GetStderr())
		}
		for _, user := range []string{"root", "user"} {
			for kind, c := range map[string]struct {
				path    string
				without []string
			}{"job": {"/usr/bin:/bin", agenttest.Inexpressible}, "login": {r.GetEnvs()["PATH"], nil}} {
				var got []byte
				await.Until(t, "cron runs the job of "+user, func() bool {
					got = h.exec(t, sandbox, sh("cat /tmp/"+user+"."+kind), nil).GetStdout()
					return len(got) > 0
				})
				want := maps.Clone(r.GetEnvs())
				delete(want, "HOME")
				want["PATH"] = c.path
				agenttest.CheckEnvironment(t, "cron's "+kind+" of "+user, got, want, c.without...)
			}
		}
	})
	// This comes last, because it fills the memory.
	t.Run("memory of nobody", func(t *testing.T) {
		for _, dir := range []string{"/dev/shm", "/run", "/dev"} {
			c := sh("head -c 1000m /dev/zero >" + dir + "/x; stat -c %s " + dir + "/x")
			c.User = "root"
			if got := h.exec(t, sandbox, c, nil); !strings.Contains(string(got.GetStderr()), "No space left") {
				t.Errorf("%s takes %s bytes: %q", dir, got.GetStdout(), got.GetStderr())
			}
		}
		says(t, "together", "", "df --output=size /dev/shm /run /dev | awk 'NR>1 {s+=$1} END {print (s <= '$(awk '/MemTotal/ {print $2}' /proc/meminfo)'/2)}'", "1\n")
		says(t, "afterwards", "", "echo alive", "alive\n")
	})
}

// Package engines_test runs programs in a guest that need a whole Linux machine: container
// engines, file systems in user space, virtual networks, cron. It is a separate package
// because the Debian packages that it needs take a while to install.
package engines_test

import (
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/templates"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// packages are Debian packages that minimal lacks.
var packages = strings.Fields("docker.io docker-registry busybox-static podman uidmap slirp4netns fuse-overlayfs sshfs openssh-server wireguard-tools nftables cron")

// slow skips a test that takes longer than all other tests together, unless WRENN_SLOW is
// set.
func slow(t *testing.T) {
	t.Helper()
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("starts container engines in an emulated guest, which takes 20 minutes: make test WRENN_SLOW=1")
	}
}

func installed(t *testing.T, in imagetest.Images) image.Template {
	t.Helper()
	// The docker template's recipe also does this after it has installed the engine.
	return imagetest.With(t, in, "engines", image.More{Name: "engines", Packages: packages, Customize: `chroot "$1" usermod --append --groups docker user`})
}

// tailscaled returns the path where TestImages puts tailscaled, which Debian 12 does not have.
func tailscaled(in imagetest.Images) string {
	return filepath.Join(string(in.Dir), "tailscale-1.96.5", "tailscaled")
}

// TestImages builds the image and tailscaled for the other test if there is a network.
func TestImages(t *testing.T) {
	slow(t)
	in := imagetest.Prepare(t)
	installed(t, in)
	if _, err := os.Stat(tailscaled(in)); err == nil {
		return
	}
	cmd := exec.CommandContext(t.Context(), "go", "install", "-trimpath", "-ldflags=-s -w", "tailscale.com/cmd/tailscaled@v1.96.5")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOBIN="+filepath.Dir(tailscaled(in)))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Logf("build tailscaled: %v: %s", err, out)
	}
}

// host is an installation with an agent.
type host struct{ *agenttest.Agent }

// machine is a sandbox on a host.
type machine struct {
	*host
	id string
}

func (h *host) create(t *testing.T, team, template string) machine {
	t.Helper()
	r := &pb.CreateRequest{
		SandboxId: id.Format(id.Sandbox, uuid.New()), TeamId: team, TemplateId: template, AccessToken: "a-sandboxs-token",
		Vcpus: 1, MemoryMib: 1024, Envs: map[string]string{"FROM": "sandbox", "PATH": "/opt/tool/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
	}
	begun := time.Now()
	if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
		t.Fatal(err)
	}
	t.Logf("created in %v", time.Since(begun).Round(time.Millisecond))
	return machine{h, r.GetSandboxId()}
}

func (m machine) exec(t *testing.T, user, script string) *pb.ExecResponse {
	t.Helper()
	res, err := m.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: m.id, Command: &pb.Command{Cmd: "sh", Args: []string{"-c", script}, User: user}}))
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return res.Msg
}

// run runs a script, which must succeed, and returns its output.
func (m machine) run(t *testing.T, user, script string) string {
	t.Helper()
	begun := time.Now()
	got := m.exec(t, user, script)
	if got.GetExitCode() != 0 {
		t.Fatalf("%s: exit code %d\n%s\n%s", script, got.GetExitCode(), got.GetStdout(), got.GetStderr())
	}
	t.Logf("%.60q took %v", script, time.Since(begun).Round(time.Millisecond))
	return strings.TrimSpace(string(got.GetStdout()))
}

// await repeats a script until it succeeds.
func (m machine) await(t *testing.T, what, user, script string) {
	t.Helper()
	await.Until(t, what, func() bool { return m.exec(t, user, script).GetExitCode() == 0 })
}

// get returns the response of a port of the sandbox.
func (m machine) get(t *testing.T, port, path string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, m.Base+"/proxy/"+m.id+"/"+port+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := m.Plain.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// TestEngines starts the engine of the template docker in a sandbox, as its recipe does,
// and captures it running. A sandbox of that template builds and runs containers, and
// does everything else that needs a whole machine.
func TestEngines(t *testing.T) {
	slow(t)
	owner, base := uuid.New(), uuid.New()
	team := id.Format(id.Team, owner)
	h := &host{agenttest.New(t, func(a *agenttest.Agent) {
		made := installed(t, a.Images)
		home := a.Dir.Template(owner, base)
		if err := os.MkdirAll(home, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"template.json", "rootfs.ext4"} {
			if err := os.Link(filepath.Join(filepath.Dir(made.Rootfs), name), filepath.Join(home, name)); err != nil {
				t.Fatal(err)
			}
		}
	})}
	folder, err := templates.Folder("docker")
	if err != nil {
		t.Fatal(err)
	}
	text, err := fs.ReadFile(folder, "Recipe")
	if err != nil {
		t.Fatal(err)
	}
	r, err := recipe.Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	builder := h.create(t, team, id.Format(id.Template, base))
	builder.run(t, "user", "setsid "+r.Start.Command.Shell+" >/tmp/engine.log 2>&1 </dev/null &")
	builder.await(t, "the engine runs", "user", r.HealthCheck.Command.Shell)
	tpl, err := h.Snapshot(t.Context(), connect.NewRequest(&pb.SnapshotRequest{SandboxId: builder.id, TemplateId: id.Format(id.Template, uuid.New()), Name: "docker"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Destroy(t.Context(), connect.NewRequest(&pb.DestroyRequest{SandboxId: builder.id})); err != nil {
		t.Fatal(err)
	}
	m := h.create(t, team, tpl.Msg.GetTemplate().GetTemplateId())

	// Cron starts the job within a minute, during the other checks. Cron jobs have their own
	// PATH, so they need the program's full path.
	m.run(t, "root", `mkdir -p /opt/tool/bin && printf '#!/bin/sh\necho "tool has $FROM"\n' >/opt/tool/bin/mytool && chmod +x /opt/tool/bin/mytool
for u in root user; do echo '* * * * * /opt/tool/bin/mytool >/tmp/'$u | crontab -u $u -; done; cron`)

	t.Run("docker", func(t *testing.T) {
		m.run(t, "root", "mkdir -p /srv/registry && printf 'version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: /srv/registry\nhttp:\n  addr: 127.0.0.1:5000\n' >/srv/registry.yml\nsetsid docker-registry serve /srv/registry.yml >/tmp/registry.log 2>&1 </dev/null &")
		m.await(t, "the registry responds", "user", "curl -fs http://127.0.0.1:5000/v2/")
		m.run(t, "user", `set -e
mkdir -p box/bin && cp /bin/busybox box/bin && for a in sh echo cat httpd wget; do ln -s busybox box/bin/$a; done
tar -C box -c . | docker import - 127.0.0.1:5000/box
docker push -q 127.0.0.1:5000/box && docker image rm 127.0.0.1:5000/box && docker pull -q 127.0.0.1:5000/box
mkdir image && printf 'FROM 127.0.0.1:5000/box\nRUN echo built >/index.html\nCMD ["/bin/httpd", "-f", "-p", "80", "-h", "/"]\n' >image/Dockerfile
DOCKER_BUILDKIT=0 docker build -t page image`)
		m.run(t, "user", "docker run -d --restart=always --memory=64m -p 8080:80 page")
		page := func(when string) {
			t.Helper()
			await.Until(t, "the container's server responds "+when, func() bool {
				code, body := m.get(t, "8080", "/index.html")
				return code == http.StatusOK && body == "built\n"
			})
		}
		page("at first")
		if got := m.run(t, "user", "docker run --rm page cat /index.html && docker network create --ipv6 --subnet 2001:db8::/64 six"); !strings.HasPrefix(got, "built\n") {
			t.Errorf("a container printed %q", got)
		}
		if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: m.id})); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: m.id})); err != nil {
			t.Fatal(err)
		}
		page("after a pause")
	})
	t.Run("podman", func(t *testing.T) {
		m.run(t, "user", "tar -C box -c . | podman --cgroup-manager=cgroupfs import - localhost/box")
		if got := m.run(t, "user", "podman --cgroup-manager=cgroupfs run --rm localhost/box cat /proc/self/uid_map"); !strings.Contains(got, "1000") {
			t.Errorf("users of a rootless container: %q", got)
		}
		m.run(t, "user", "podman --cgroup-manager=cgroupfs run -d --name page -p 8081:80 localhost/box httpd -f -p 80 -h /bin")
		await.Until(t, "the rootless container's server responds", func() bool {
			code, _ := m.get(t, "8081", "/busybox")
			return code == http.StatusOK
		})
	})
	t.Run("sshfs", func(t *testing.T) {
		m.run(t, "root", "mkdir -p /run/sshd && /usr/sbin/sshd")
		m.run(t, "user", `set -e
mkdir -p -m 700 .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519 && cp .ssh/id_ed25519.pub .ssh/authorized_keys
mkdir remote there && echo far >remote/file
sshfs -o StrictHostKeyChecking=no 127.0.0.1:remote there
test "$(cat there/file)" = far && echo near >there/new && test "$(cat remote/new)" = near && fusermount3 -u there`)
	})
	t.Run("loop", func(t *testing.T) {
		m.run(t, "root", `set -e
truncate -s 32M /tmp/disk && mke2fs -q /tmp/disk && mkdir -p /tmp/mounted && mount -o loop /tmp/disk /tmp/mounted
echo kept >/tmp/mounted/file && umount /tmp/mounted && mount -o loop,ro /tmp/disk /tmp/mounted && grep kept /tmp/mounted/file && umount /tmp/mounted`)
	})
	t.Run("networks", func(t *testing.T) {
		m.run(t, "root", `set -e
ip netns add one && ip link add v1 type veth peer name v2 netns one && ip link add br7 type bridge
ip link set v1 master br7 up && ip addr add 192.0.2.1/24 dev br7 && ip link set br7 up
ip -n one addr add 192.0.2.2/24 dev v2 && ip -n one link set v2 up
cd /tmp && wg genkey >a && wg genkey >b
ip link add wg0 type wireguard && ip addr add 198.51.100.1/24 dev wg0
wg set wg0 listen-port 51820 private-key a peer $(wg pubkey <b) allowed-ips 198.51.100.2/32 && ip link set wg0 up
ip -n one link add wg1 type wireguard && ip -n one addr add 198.51.100.2/24 dev wg1
ip netns exec one wg set wg1 private-key b peer $(wg pubkey <a) endpoint 192.0.2.1:51820 allowed-ips 198.51.100.1/32 && ip -n one link set wg1 up
echo through >/tmp/page && cd /tmp && (setsid busybox httpd -f -p 198.51.100.1:8090 -h /tmp >/dev/null 2>&1 </dev/null &)
for i in $(seq 60); do ip netns exec one curl -fsm 60 http://198.51.100.1:8090/page && break; sleep 1; done | grep through
nft add table inet t && nft 'add chain inet t in { type filter hook input priority 0; }' && nft 'add rule inet t in tcp dport 8090 iifname wg0 counter reject'
! ip netns exec one curl -fsm 60 http://198.51.100.1:8090/page && nft list table inet t | grep -v 'packets 0' | grep counter`)
	})
	t.Run("tailscaled", func(t *testing.T) {
		program, err := os.Open(tailscaled(h.Images))
		if err != nil {
			t.Skip("needs tailscaled, which TestImages could not build: ", err)
		}
		defer program.Close()
		s := h.WriteFileStream(t.Context())
		if err := s.Send(&pb.WriteFileStreamRequest{Message: &pb.WriteFileStreamRequest_Start_{Start: &pb.WriteFileStreamRequest_Start{File: &pb.FileRef{SandboxId: m.id, Path: "/tmp/tailscaled"}}}}); err != nil {
			t.Fatal(err)
		}
		for part := make([]byte, 64<<10); ; {
			n, err := program.Read(part)
			if err == io.EOF {
				break
			}
			if err == nil {
				err = s.Send(&pb.WriteFileStreamRequest{Message: &pb.WriteFileStreamRequest_Chunk{Chunk: part[:n]}})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.CloseAndReceive(); err != nil {
			t.Fatal(err)
		}
		// Tailscaled assumes that a machine with only a link-local address has no network.
		m.run(t, "root", "chmod +x /tmp/tailscaled && ip addr add 10.0.0.1/32 dev eth0 && setsid /tmp/tailscaled --tun=tailscale0 --state=mem: --statedir=/tmp/tailscale >/tmp/tailscaled.log 2>&1 </dev/null &")
		m.await(t, "tailscaled creates its device", "root", "ip link show tailscale0 && ip rule | grep -q 'lookup 52' && grep -q 'got LocalBackend' /tmp/tailscaled.log")
		m.run(t, "root", "! grep 'all links down' /tmp/tailscaled.log")
	})
	t.Run("cron", func(t *testing.T) {
		for _, user := range []string{"root", "user"} {
			m.await(t, "cron runs the job of "+user, user, "test \"$(cat /tmp/"+user+")\" = 'tool has sandbox'")
		}
	})
}

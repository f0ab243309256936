package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

const (
	doorRounds  = 5
	doorSeconds = 4
	doorClients = 200
	doorPort    = 18080
	sshPort     = 18022
	floorPort   = 18033
	execRounds  = 40
)

// TestFrontDoor measures a request to a sandbox's port through the whole chain, beside
// nginx in front of the same guest.
func TestFrontDoor(t *testing.T) {
	asked(t)
	needs(t, "nginx", "wrk", "ss")
	d := newDoor(t)
	d.serve(t)
	guest := d.guestAddress(t)
	hops, masters := startNginx(t, net.JoinHostPort(guest, strconv.Itoa(doorPort)))
	var rows [][]string
	for _, clients := range []int{1, doorClients} {
		kinds := []struct {
			name, url string
			header    []string
		}{
			{"`wrenn up`: server, agent", "http://" + d.listen + "/", []string{"Host: " + d.host(), "X-Traffic-Token: " + d.traffic}},
			{"the same, with an API key", "http://" + d.listen + "/", []string{"Host: " + d.host(), "X-API-Key: " + d.key}},
			{"three nginx", "http://" + hops[2] + "/", nil},
			{"two nginx", "http://" + hops[1] + "/", nil},
			{"one nginx", "http://" + hops[0] + "/", nil},
			{"straight to the guest", fmt.Sprintf("http://%s:%d/", guest, doorPort), nil},
		}
		rates, tails, costs := make([][]int64, len(kinds)), make([]sample, len(kinds)), make([][]int64, len(kinds))
		for range doorRounds {
			for i, k := range kinds { // Alternate, because the machine's speed varies.
				before := processorTime(t, append(masters, d.pid)...)
				requests, rate, p99 := wrk(t, clients, k.url, k.header)
				cost := processorTime(t, append(masters, d.pid)...) - before
				rates[i], tails[i], costs[i] = append(rates[i], rate), append(tails[i], p99), append(costs[i], cost.Microseconds()/requests)
			}
		}
		for i, k := range kinds {
			rows = append(rows, []string{
				strconv.Itoa(clients), k.name, strconv.FormatInt(middle(rates[i]), 10), ms(tails[i].mid()), fmt.Sprintf("%d µs", middle(costs[i])),
				times(middle(rates[i]), middle(rates[2])), times(tails[i].mid(), tails[2].mid()),
				times(middle(rates[i]), middle(rates[3])), times(tails[i].mid(), tails[3].mid()),
			})
		}
	}
	table("Requests to a sandbox's port", []string{"clients", "through", "requests per second", "p99", "processor time of the proxies, a request", "requests: this ÷ three nginx", "99 %: this ÷ three nginx", "requests: this ÷ two nginx", "99 %: this ÷ two nginx"}, rows)
}

// processorTime returns the processor time of the children of processes.
func processorTime(t *testing.T, parents ...int) (used time.Duration) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		fields, err := stat(file)
		if err != nil {
			continue // It has ended.
		}
		if parent, _ := strconv.Atoi(fields[1]); slices.Contains(parents, parent) {
			used += usedBy(fields)
		}
	}
	return used
}

// processTime returns a process's processor time.
func processTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	fields, err := stat(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return usedBy(fields)
}

// stat reads the fields of a process's stat that follow its name.
func stat(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])), nil
}

// usedBy returns the processor time in a process's stat.
func usedBy(fields []string) time.Duration {
	ticks := 0
	for _, f := range fields[11:13] { // utime and stime
		n, _ := strconv.Atoi(f)
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // Linux's USER_HZ
}

// needs skips a benchmark if a program is missing.
func needs(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

// TestCommand measures a command through the API, beside one over an ssh connection and
// the minimum that a guest can do.
func TestCommand(t *testing.T) {
	asked(t)
	needs(t, "ssh", "ss", "/usr/sbin/sshd", "gcc")
	d := newDoor(t)
	d.serve(t)
	d.commands(t, d.guestAddress(t))
}

// door is one `wrenn up` with a sandbox.
type door struct {
	listen, key string
	pid         int // of wrenn up
	api         *client.Client
	box         string
	traffic     string // the sandbox's token
}

func (d *door) host() string { return fmt.Sprintf("%d-%s.localhost", doorPort, d.box) }

// newDoor starts the built programs on the tests' images.
func newDoor(t *testing.T) *door {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getenv("WRENN_TEST_BUILT") == "" { // the lab cannot build, and has what its machine built
		if out, err := exec.Command("make", "-s", "-C", root, "build").CombinedOutput(); err != nil {
			t.Fatalf("make build: %v: %s", err, out)
		}
	}
	in := imagetest.Prepare(t)
	dir, err := os.MkdirTemp("", "wrenn-bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"kernels", "images"} {
		from := filepath.Join(string(in.Dir), part)
		if _, err := os.Stat(from); err != nil {
			continue // wrenn up creates it.
		}
		if out, err := exec.Command("cp", "-a", "--sparse=always", from, dir).CombinedOutput(); err != nil {
			t.Fatalf("copy images: %v: %s", err, out)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{listen: l.Addr().String()}
	l.Close()
	cmd := exec.Command(filepath.Join(root, "bin", "wrenn"), "up", "--dir", dir, "--listen", d.listen)
	cmd.Env = append(os.Environ(), "WRENN_ENVD="+in.Envd, "WRENN_RATE_READ=100000000", "WRENN_RATE_CHANGE=100000000", "WRENN_RATE_EXPENSIVE=100000000") // the images contain it
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.pid = cmd.Process.Pid
	ready, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for s := bufio.NewScanner(out); s.Scan(); {
			fmt.Fprintln(os.Stderr, s.Text())
			if strings.HasSuffix(s.Text(), "] ready") {
				close(ready)
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		_ = cmd.Wait()
	})
	select {
	case <-ready:
	case <-ended:
		t.Fatal("wrenn up ended")
	case <-t.Context().Done():
		t.FailNow()
	}
	var credentials struct {
		Key string `json:"api_key"`
	}
	b, err := os.ReadFile(layout.Dir(dir).Credentials())
	if err == nil {
		err = json.Unmarshal(b, &credentials)
	}
	if err != nil {
		t.Fatal(err)
	}
	d.key = credentials.Key
	if d.api, err = client.New("http://"+d.listen, d.key); err != nil {
		t.Fatal(err)
	}
	timeout := 3600
	box, err := d.api.Create(t.Context(), client.CreateOptions{MemoryMiB: 512, TimeoutSeconds: &timeout})
	if err != nil {
		t.Fatal(err)
	}
	d.box, d.traffic = box.ID, box.TrafficToken
	return d
}

// put copies a file of this machine into the guest.
func (d *door) put(t *testing.T, from, to string) {
	t.Helper()
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := d.api.WriteFile(t.Context(), d.box, to, "root", f); err != nil {
		t.Fatal(err)
	}
}

// sh runs a script in the guest.
func (d *door) sh(t *testing.T, script string) {
	t.Helper()
	r, err := d.api.Exec(t.Context(), d.box, client.Command{Cmd: script, Shell: true, User: "root"}, nil)
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("%s: %v, %+v", script, err, r)
	}
}

// serve starts the small server in the guest.
func (d *door) serve(t *testing.T) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "upstream")
	cmd := exec.Command("go", "build", "-o", program, "./testdata/upstream")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build upstream: %v: %s", err, out)
	}
	d.put(t, program, "/opt/upstream")
	d.sh(t, fmt.Sprintf("chmod 755 /opt/upstream; nohup /opt/upstream :%d >/dev/null 2>&1 &", doorPort))
}

// guestAddress returns the address at which the host reaches the guest: the peer of the
// connection that the agent keeps after a request.
func (d *door) guestAddress(t *testing.T) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+d.listen+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = d.host()
	req.Header.Set("X-API-Key", d.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	var body bytes.Buffer
	_, _ = body.ReadFrom(resp.Body)
	resp.Body.Close()
	out, err := exec.Command("ss", "-Htn", "state", "established", "dport", fmt.Sprintf("= :%d", doorPort)).CombinedOutput()
	found := regexp.MustCompile(`(10\.\d+\.\d+\.\d+):` + strconv.Itoa(doorPort)).FindSubmatch(out)
	if resp.StatusCode != http.StatusOK || body.String() != "hello, world\n" || err != nil || found == nil {
		t.Fatalf("%s %q, %v: %s", resp.Status, &body, err, out)
	}
	return string(found[1])
}

// startNginx starts three nginx in a row in front of an upstream. It returns their
// addresses, the nearest to the upstream first, and their main processes.
func startNginx(t *testing.T, upstream string) (hops []string, masters []int) {
	t.Helper()
	dir := t.TempDir()
	for n := range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listen := l.Addr().String()
		l.Close()
		home := filepath.Join(dir, strconv.Itoa(n))
		if err := os.Mkdir(home, 0o755); err != nil {
			t.Fatal(err)
		}
		config := fmt.Sprintf(`daemon off; user root; worker_processes 2; pid %[1]s/pid; error_log stderr;
events { worker_connections 4096; }
http {
	access_log off; keepalive_requests 1000000000;
	client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
	upstream next { server %[2]s; keepalive 512; keepalive_requests 1000000000; }
	server { listen %[3]s; location / { proxy_pass http://next; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host; proxy_buffering off; } }
}`, home, upstream, listen)
		file := filepath.Join(home, "nginx.conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("nginx", "-p", home, "-c", file)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			_ = cmd.Wait()
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		for {
			conn, err := net.Dial("tcp", listen)
			if err == nil {
				conn.Close()
				break
			}
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
		hops, masters, upstream = append(hops, listen), append(masters, cmd.Process.Pid), listen
	}
	return hops, masters
}

// wrk runs wrk with a number of clients, and returns the number of requests, the requests
// per second, and the 99th percentile of the latency.
func wrk(t *testing.T, clients int, url string, header []string) (requests, rate int64, p99 time.Duration) {
	t.Helper()
	args := []string{"-t1", "-c" + strconv.Itoa(clients), "-d" + strconv.Itoa(doorSeconds) + "s", "--timeout", "30s", "--latency"}
	for _, h := range header {
		args = append(args, "-H", h)
	}
	out, err := exec.CommandContext(t.Context(), "wrk", append(args, url)...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("Non-2xx")) || bytes.Contains(out, []byte("Socket errors")) {
		t.Fatalf("wrk %s: %v: %s", url, err, out)
	}
	perSecond := regexp.MustCompile(`Requests/sec:\s+([\d.]+)`).FindSubmatch(out)
	all := regexp.MustCompile(`(\d+) requests in`).FindSubmatch(out)
	tail := regexp.MustCompile(`(?m)^\s+99%\s+(\S+)\s*$`).FindSubmatch(out)
	if perSecond == nil || tail == nil || all == nil {
		t.Fatalf("wrk printed %s", out)
	}
	r, err := strconv.ParseFloat(string(perSecond[1]), 64)
	if err == nil {
		requests, err = strconv.ParseInt(string(all[1]), 10, 64)
	}
	if err == nil {
		p99, err = time.ParseDuration(string(tail[1]))
	}
	if err != nil {
		t.Fatal(err)
	}
	return requests, int64(r), p99
}

// commands runs true in the guest, through the API and over one ssh connection.
func (d *door) commands(t *testing.T, guest string) {
	t.Helper()
	home := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		return string(out)
	}
	// The guest has the same distribution, so this machine's sshd runs there with its
	// libraries.
	run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(home, "key"))
	run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(home, "host"))
	d.put(t, "/usr/sbin/sshd", "/opt/ssh/sshd")
	for _, lib := range regexp.MustCompile(`=> (/\S+)`).FindAllStringSubmatch(run("ldd", "/usr/sbin/sshd"), -1) {
		d.put(t, lib[1], "/opt/ssh/lib/"+filepath.Base(lib[1]))
	}
	d.put(t, filepath.Join(home, "host"), "/opt/ssh/host")
	d.put(t, filepath.Join(home, "key.pub"), "/opt/ssh/authorized")
	d.sh(t, fmt.Sprintf(`chmod 755 /opt/ssh/sshd; chmod 600 /opt/ssh/host; mkdir -p /run/sshd
id sshd >/dev/null 2>&1 || useradd --system --no-create-home --home-dir /run/sshd --shell /usr/sbin/nologin sshd
LD_LIBRARY_PATH=/opt/ssh/lib nohup /opt/ssh/sshd -D -e -f /dev/null -p %d -h /opt/ssh/host -o UsePAM=no -o StrictModes=no -o AuthorizedKeysFile=/opt/ssh/authorized -o PermitRootLogin=yes -o PidFile=none >/opt/ssh/log 2>&1 &
n=0; until ss -Hltn "sport = :%[1]d" | grep -q . || [ $((n += 1)) = 100 ]; do sleep 0.1; done; [ $n -lt 100 ] || { cat /opt/ssh/log; exit 1; }`, sshPort))
	options := []string{
		"-i", filepath.Join(home, "key"), "-p", strconv.Itoa(sshPort), "-o", "ControlPath=" + filepath.Join(home, "mux"),
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
	}
	master := exec.CommandContext(t.Context(), "ssh", append(options, "-M", "-N", "root@"+guest)...)
	master.Stderr = os.Stderr
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = master.Process.Kill()
		_ = master.Wait()
	}()
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if exec.Command("ssh", append(options, "-O", "check", "root@"+guest)...).Run() == nil {
			break
		}
		if time.Since(began) > time.Minute {
			t.Fatal("ssh does not connect")
		}
	}
	floor := d.floor(t, guest)
	ways := []struct {
		name string
		run  func()
	}{
		{"the API (`exec`, one keep-alive connection)", func() {
			r, err := d.api.Exec(t.Context(), d.box, client.Command{Cmd: "true", User: "root"}, nil)
			if err != nil || r.ExitCode != 0 {
				t.Fatalf("true: %v, %+v", err, r)
			}
		}},
		{"the same, by a shell (`sh -c true`)", func() { d.sh(t, "true") }},
		{"a multiplexed ssh connection", func() { run("ssh", append(options, "root@"+guest, "true")...) }},
		{"floor: a C program in the guest that runs it", func() { floor('x') }},
		{"of that: a byte to the program and back", func() { floor('e') }},
	}
	const ssh = 2
	taken := make([]sample, len(ways))
	for range execRounds {
		for i, way := range ways { // Alternate, because the machine's speed varies.
			began := time.Now()
			way.run()
			taken[i] = append(taken[i], time.Since(began))
		}
	}
	var rows [][]string
	for i, way := range ways {
		rows = append(rows, []string{way.name, taken[i].span(), times(taken[i].mid(), taken[ssh].mid()), times(taken[i].mid(), taken[len(ways)-2].mid())})
	}
	table("The command `true` in a guest", []string{"through", "time", "this ÷ ssh", "this ÷ floor"}, rows)
}

// floor starts the C program in the guest, and returns a function that makes it respond.
func (d *door) floor(t *testing.T, guest string) func(byte) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "floor")
	if out, err := exec.CommandContext(t.Context(), "gcc", "-O2", "-static", "-o", program, "testdata/floor/floor.c").CombinedOutput(); err != nil {
		t.Fatalf("build floor: %v: %s", err, out)
	}
	d.put(t, program, "/opt/floor")
	d.sh(t, fmt.Sprintf(`chmod 755 /opt/floor; nohup /opt/floor %d >/dev/null 2>&1 &
n=0; until ss -Hltn "sport = :%[1]d" | grep -q . || [ $((n += 1)) = 100 ]; do sleep 0.1; done; [ $n -lt 100 ]`, floorPort))
	conn, err := net.Dial("tcp", net.JoinHostPort(guest, strconv.Itoa(floorPort)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func(b byte) {
		t.Helper()
		got := []byte{0}
		if _, err := conn.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(got); err != nil || got[0] != b {
			t.Fatalf("floor answers %q, %v", got, err)
		}
	}
}

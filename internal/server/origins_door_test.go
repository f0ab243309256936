package server_test

import (
	"crypto/tls"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/deploy/deploytest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// door is the real front door, Caddy, before a control plane.
type door struct {
	*plane
	*deploytest.Door
	scheme, service, domain string
}

// openDoor restarts p behind a front door with the given names.
func (p *plane) openDoor(scheme, service, domain string) *door {
	p.Helper()
	d := &door{plane: p, Door: deploytest.Listen(p.TB), scheme: scheme, service: service, domain: domain}
	p.end()
	p.config.PublicURL, p.config.Domain, p.config.SandboxDomain = d.url(service), service, ""
	env := []string{"WRENN_DOMAIN=" + service}
	if domain != service {
		p.config.SandboxDomain = domain
		env = append(env, "WRENN_SANDBOX_DOMAIN="+domain)
	}
	p.start()
	server := p.http.Listener.Addr().String()
	if scheme == "http" {
		d.Serve(p.TB, server, env...)
	} else {
		d.ServeTLS(p.TB, server, []string{service, "*." + service, domain, "*." + domain}, env...)
	}
	return d
}

// url returns the URL of a name at the front door.
func (d *door) url(name string) string { return d.scheme + "://" + name + ":" + d.Port }

// port returns the URL of a sandbox's port.
func (d *door) port(port, sandbox string) string { return d.url(port + "-" + sandbox + "." + d.domain) }

// client returns a client that finds every name at the front door.
func (d *door) client(h2 bool) *http.Client {
	transport := netaddr.Transport(d.Address, h2)
	if d.scheme == "https" {
		transport = netaddr.TLSTransport(d.Address, h2, &tls.Config{RootCAs: d.Trust})
	}
	d.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: browser.CheckRedirect}
}

// TestOriginsAtFrontDoor checks that the rules for guests' responses and for names also
// hold behind the real front door.
func TestOriginsAtFrontDoor(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var reached atomic.Int64
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		hostileDaemon(w, r)
	})
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	sandbox := made.str("id")
	get := func(c *http.Client, url string, header ...string) (*http.Response, []http.Header) {
		t.Helper()
		var early []http.Header
		req, err := http.NewRequestWithContext(withEarly(await.Context(t), &early), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp, early
	}
	for scheme, names := range map[string][2]string{"http": {"localhost", "localhost"}, "https": {"wrenn.example.com", "sandboxes.example.net"}} {
		d := p.openDoor(scheme, names[0], names[1])
		for _, h2 := range []bool{false, true} {
			c := d.client(h2)
			daemon := d.port("49983", sandbox)
			resp, early := get(c, daemon+signed("/a", made.str("access_token"), time.Now().Add(time.Hour)))
			wantHarmless(t, daemon, true, resp, early)
			before := reached.Load()
			if resp, _ := get(c, daemon+"/files?path=/a&signature=v1_x"); resp.StatusCode != http.StatusUnauthorized || reached.Load() != before {
				t.Errorf("%s: a forged signature: %s", daemon, resp.Status)
			}
			want := map[string]int{
				d.url(d.service) + "/docs":            200,
				d.url(d.service) + "/verify":          200,
				d.url(d.service) + "/api/verify":      200,
				d.url(d.service) + "/confirm-channel": 200,
				d.url(d.service) + "/":                302,
				d.url("80-cl-x."+d.domain) + "/":      400,
				d.url("80-cl-x."+d.domain) + "/api/x": 400,
			}
			if d.service != d.domain {
				for _, name := range []string{d.domain, "www." + d.domain, "80-" + sandbox + "." + d.service} {
					want[d.url(name)+"/"], want[d.url(name)+"/docs"], want[d.url(name)+"/api/verify"] = 404, 404, 404
				}
			}
			if d.scheme == "http" {
				want[d.url("wrenn.example.com")+"/verify"], want[d.url("wrenn.example.com")+"/confirm-channel"] = 403, 403
			}
			for url, status := range want {
				if resp, _ := get(c, url); resp.StatusCode != status {
					t.Errorf("%s: %s, want %d", url, resp.Status, status)
				}
			}
			// A proxy on this machine reports that it terminates TLS.
			if d.scheme == "http" {
				if resp, _ := get(c, d.url("wrenn.example.com")+"/verify", "X-Forwarded-Proto", "https"); resp.StatusCode != http.StatusOK {
					t.Errorf("behind another proxy: %s", resp.Status)
				}
			}
		}
	}
}

// hostilePage is a port of a guest that attacks the browser.
func hostilePage(service string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		parts := strings.SplitN(r.URL.Path, "/", 5) // /proxy/SANDBOX/PORT/…
		switch h := w.Header(); {
		case parts[3] == "49983":
			h.Set("Content-Type", "text/html")
			h.Set("Set-Cookie", "daemon=1; Path=/")
			_, _ = w.Write([]byte("<title>daemon</title><script>document.title = 'ran'</script><p>of the guest"))
		case parts[4] == "cookies":
			h.Set("Content-Type", "text/plain")
			_, _ = w.Write([]byte(r.Header.Get("Cookie")))
		default:
			h.Set("Content-Type", "text/html")
			h.Add("Set-Cookie", "tossed=1; Path=/; Domain="+service)
			h.Add("Set-Cookie", "wrenn_access=evil; Path=/; Domain="+service)
			h.Add("Set-Cookie", "own=1; Path=/")
			h.Set("Clear-Site-Data", `"cookies"`)
			_, _ = w.Write([]byte("<title>guest</title>"))
		}
	})
}

// TestOriginsInBrowser opens a guest's pages in Chromium. They try to read the service's
// cookies and to run scripts in its origin.
func TestOriginsInBrowser(t *testing.T) {
	t.Parallel()
	needBrowser(t)
	p := newPlane(t)
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	for name, at := range map[string][3]string{
		"loopback":        {"http", "localhost", "localhost"},
		"below-service":   {"https", "wrenn.example.com", "wrenn.example.com"},
		"separate-domain": {"https", "wrenn.example.com", "sandboxes.example.net"},
	} {
		d := p.openDoor(at[0], at[1], at[2])
		p.agent.guest = hostilePage(d.service)
		d.browse(name, "origins.spec.js",
			"WRENN_EMAIL=admin@example.com", "WRENN_PASSWORD=correct horse", "WRENN_TRAFFIC="+made.str("traffic_token"),
			"WRENN_PORT_URL="+d.port("80", made.str("id")), "WRENN_FILE_URL="+d.port("49983", made.str("id"))+signed("/x.html", made.str("access_token"), time.Now().Add(time.Hour)))
	}
}

// TestConfirmInBrowser opens a channel's confirmation link in Chromium.
func TestConfirmInBrowser(t *testing.T) {
	t.Parallel()
	needBrowser(t)
	p := newPlane(t)
	messages := p.mailed()
	d := p.openDoor("http", "localhost", "localhost")
	asAda := as(p.bearer(p.person("ada@example.com")))
	p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201)
	body := map[string]any{"name": "c", "kind": "email", "address": "ops@example.com", "events": []string{"sandbox.lost"}}
	made := p.call("POST", "/v1/channels", body, asAda...).want(201)
	link := regexp.MustCompile(`http\S*/confirm-channel#token=\S+`).FindString(messages())
	d.browse("confirm", "confirm.spec.js", "WRENN_LINK="+link)
	if got := p.call("GET", "/v1/channels/"+made.str("id"), nil, asAda...).want(200).object(); got["confirmed"] != true {
		t.Errorf("confirmed: %v", got)
	}
}

// browserTests is the folder of the tests that run in a browser.
const browserTests = "../../test/browser"

// needBrowser skips the test if Chromium or Playwright is missing.
func needBrowser(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Skip("needs chromium")
	}
	if _, err := os.Stat(filepath.Join(browserTests, "node_modules/.bin/playwright")); err != nil {
		t.Skip("needs Playwright: npm ci --prefix test/browser")
	}
}

// browse runs a file of browser tests and saves its output under the name.
func (d *door) browse(name, file string, env ...string) {
	d.Helper()
	cmd := exec.CommandContext(d.Context(), "node_modules/.bin/playwright", "test", file)
	cmd.Dir = browserTests
	cmd.Env = append(os.Environ(), append(env, "WRENN_URL="+d.url(d.service), "WRENN_BROWSER_OUT="+filepath.Join(d.ArtifactDir(), name))...)
	if out, err := cmd.CombinedOutput(); err != nil {
		d.Errorf("%s: playwright: %v\n%s", name, err, out)
	}
}

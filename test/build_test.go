package e2e

import (
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
)

// greeting makes a Debian package with one program, greet.
func greeting(t *testing.T, file string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "greet")
	for name, text := range map[string]string{
		"DEBIAN/control":  "Package: greet\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: says something\n",
		"usr/games/greet": "#!/bin/sh\necho \"< $* >\"\n",
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("dpkg-deb", "--build", "--root-owner-group", dir, file).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
}

// TestBuild builds a template that installs a package, copies a folder, sets
// variables, and runs a web server with a health check; and again with its last
// step changed.
func TestBuild(t *testing.T) {
	i := up(t)
	c := i.client(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"site/index.html": "built\n", "site/sub/page": "page\n", ".wrennignore": "**/*.tmp\n", "site/left.tmp": "x"} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The package is copied in: a test must not need the distribution's servers.
	greeting(t, filepath.Join(dir, "greet.deb"))
	recipe := `FROM minimal
ENV PORT=8000 GREETING="hello there"
COPY greet.deb /tmp/
RUN dpkg -i /tmp/greet.deb && rm /tmp/greet.deb
WORKDIR /srv/site
COPY --chown=user:user --chmod=0640 site/ ./
RUN sleep 1000 >/dev/null 2>&1 & echo step one
USER user
RUN id -un; greet "$GREETING" > /tmp/greeting; echo LAST
START python3 -m http.server ${PORT}
HEALTHCHECK --interval=1s --retries=60 CMD curl -fs http://localhost:8000/
`
	build := func(text string, args ...string) (*client.Build, time.Duration) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "Recipe"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		out, errs, code := i.cli(t, "", slices.Concat([]string{"build", "-t", "hello", "--skip-pre-post", "--step-timeout", "5m"}, args, []string{dir})...)
		took := time.Since(begun)
		if code != 0 || !strings.HasPrefix(out, "hello@") {
			t.Fatalf("wrenn build: exit code %d: %s\n%s", code, out, errs)
		}
		id := strings.Fields(errs)[1]
		b, err := c.GetBuild(t.Context(), id)
		if err != nil || b.State != "succeeded" || b.DoneSteps != b.TotalSteps || len(b.Steps) != b.TotalSteps {
			t.Fatalf("%+v, %v", b, err)
		}
		return b, took
	}
	states := func(b *client.Build) (s []string) {
		for _, step := range b.Steps {
			s = append(s, step.State)
		}
		return s
	}
	first, took := build(recipe)
	t.Logf("the first build took %v", took)
	for _, s := range first.Steps {
		t.Logf("%d %s %q: %s, %d ms: %s", s.Number, s.Phase, s.Text, s.State, s.DurationMS, s.Output)
	}
	defer func() { _ = c.DeleteTemplate(t.Context(), "hello") }()

	ask := func(sandbox string) string {
		resp := i.request(t, http.MethodGet, "8000-"+sandbox+".localhost", "/", http.Header{"X-Api-Key": {i.creds.APIKey}}, nil)
		b, _ := io.ReadAll(resp.Body)
		return string(b)
	}
	// As quick as a bare restore, to the first answer.
	fastest := func(template string, serves bool) time.Duration {
		t.Helper()
		best := time.Hour
		for range 4 {
			begun := time.Now()
			sb, err := c.Create(t.Context(), client.CreateOptions{Template: template})
			if err != nil {
				t.Fatal(err)
			}
			if serves {
				if got := ask(sb.ID); got != "built\n" {
					t.Errorf("the first answer is %q", got)
				}
			}
			best = min(best, time.Since(begun))
			if err := c.Delete(t.Context(), sb.ID); err != nil {
				t.Fatal(err)
			}
		}
		return best
	}
	bare, serves := fastest("minimal", false), fastest("hello", true)
	t.Logf("a sandbox of minimal is there after %v, one of hello has answered its first request after %v: %.1f times", bare, serves, float64(serves)/float64(bare))
	if serves > 2*bare+200*time.Millisecond { // on a busy machine neither is exact
		t.Errorf("the first answer took %v, a bare restore %v", serves, bare)
	}

	sb, err := c.Create(t.Context(), client.CreateOptions{Template: "hello:latest", Envs: map[string]string{"MORE": "1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Delete(t.Context(), sb.ID) }()
	r, err := c.Exec(t.Context(), sb.ID, client.Command{Shell: true, Cmd: `id -un; pwd; echo "$GREETING $MORE"; cat /tmp/greeting; stat -c '%U:%G %a' index.html; ls; pgrep -c sleep`}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := "user\n/srv/site\nhello there 1\n< hello there >\nuser:user 640\nindex.html\nsub\n0\n"; string(r.Stdout) != want {
		t.Errorf("in the sandbox: %q %q, not %q", r.Stdout, r.Stderr, want)
	}

	// One changed last step: the others are not run again.
	second, took := build(strings.Replace(recipe, "LAST", "OTHER", 1))
	t.Logf("with one changed step it took %v", took)
	// (USER keeps nothing: it only looks whether there is one.)
	if got, want := states(second), []string{"cached", "cached", "cached", "cached", "cached", "cached", "succeeded", "succeeded", "succeeded", "succeeded", "succeeded"}; !slices.Equal(got, want) {
		t.Errorf("the second build's steps were %q, not %q", got, want)
	}
	if second.Version != first.Version+1 {
		t.Errorf("version %d after %d", second.Version, first.Version)
	}
	// What runs goes on, and the version that it is of stays.
	if got := ask(sb.ID); got != "built\n" {
		t.Errorf("after a rebuild the sandbox answers %q", got)
	}
	// Without a health check it is the disk alone, which is booted once.
	third, took := build("FROM hello\nUSER root\nRUN greet again > /tmp/greeting && sync\n")
	t.Logf("of the disk alone it took %v", took)
	of, err := c.Create(t.Context(), client.CreateOptions{Template: third.TemplateID})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Delete(t.Context(), of.ID) }()
	if r, err = c.Exec(t.Context(), of.ID, client.Command{Shell: true, Cmd: `id -un; cat /tmp/greeting; cat /srv/site/sub/page; echo $PORT`}, nil); err != nil || string(r.Stdout) != "root\n< again >\npage\n8000\n" {
		t.Errorf("of the disk alone: %q %q %v", r.Stdout, r.Stderr, err)
	}

	// A step that fails says so, and leaves nothing.
	if err := os.WriteFile(filepath.Join(dir, "Recipe"), []byte("FROM minimal\nRUN echo so far; exit 3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := i.cli(t, "", "build", "-t", "broken", "--skip-pre-post", dir)
	if code != 125 || out != "" || !strings.Contains(errs, "so far") {
		t.Errorf("a build that fails: %d %q %q", code, out, errs)
	}
	if _, err := c.Template(t.Context(), "broken"); !client.IsNotFound(err) {
		t.Errorf("a build that failed left a template: %v", err)
	}
}

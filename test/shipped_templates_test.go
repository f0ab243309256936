package e2e

import (
	"bytes"
	"image/png"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
)

// shipped builds a shipped template like a user.
func shipped(t *testing.T, name string) *installation {
	t.Helper()
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("installs packages in an emulated guest, which takes minutes and needs the distribution's servers: make test WRENN_SLOW=1")
	}
	i := up(t)
	begun := time.Now()
	out, errs, code := i.cli(t, "", "template", "build", name)
	t.Logf("wrenn template build %s took %v", name, time.Since(begun).Round(time.Second))
	if code != 0 || !strings.HasPrefix(out, name+"@") {
		if len(errs) > 6000 {
			errs = errs[len(errs)-6000:]
		}
		t.Fatalf("exit code %d: %s\n%s", code, out, errs)
	}
	b, err := i.client(t).GetBuild(t.Context(), strings.Fields(errs)[1])
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range b.Steps {
		t.Logf("%d %s %.40q: %s, %d ms", s.Number, s.Phase, s.Text, s.State, s.DurationMS)
	}
	return i
}

// TestShippedNode runs JavaScript in the template node.
func TestShippedNode(t *testing.T) {
	i := shipped(t, "node")
	if out, errs, code := i.cli(t, "", "run", "-t", "node", "--", "node", "-e", "console.log(6*7)"); out != "42\n" || code != 0 {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

// TestShippedPython uses the packages of the template python.
func TestShippedPython(t *testing.T) {
	i := shipped(t, "python")
	if out, errs, code := i.cli(t, "", "run", "-t", "python", "--", "python", "-c", "import matplotlib, numpy, pandas, requests, scipy, pip; print(numpy.arange(4).sum())"); out != "6\n" || code != 0 {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

// TestShippedDocker runs a container in the template docker, whose engine has been
// running since the capture.
func TestShippedDocker(t *testing.T) {
	i := shipped(t, "docker")
	const script = `set -e
tar -C / -c bin lib lib64 usr/bin/echo usr/lib/x86_64-linux-gnu/libc.so.6 usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 usr/lib64/ld-linux-x86-64.so.2 | docker import - echo >/dev/null
docker run --rm echo echo from a container`
	if out, errs, code := i.cli(t, "", "run", "-t", "docker", "--", "sh", "-c", script); out != "from a container\n" || code != 0 {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

// TestShippedInterpreter runs code in the template code-interpreter, built from its
// recipe, through the API and on the command line.
func TestShippedInterpreter(t *testing.T) {
	i := shipped(t, "code-interpreter")
	c := i.client(t)
	if out, errs, code := i.cli(t, "", "run", "-t", "code-interpreter", "6 * 7"); out != "42\n" || code != 0 {
		t.Errorf("wrenn run: %d %q %q", code, out, errs)
	}
	sb := i.sandbox(t, client.CreateOptions{Template: "code-interpreter"})
	run := func(code client.Code) *client.CodeResult {
		t.Helper()
		begun := time.Now()
		r, err := c.RunCode(t.Context(), sb.ID, code)
		if err != nil {
			t.Fatalf("%s: %v", code.Code, err)
		}
		t.Logf("%.40q took %v", code.Code, time.Since(begun).Round(time.Millisecond))
		return r
	}
	if r := run(client.Code{Code: "x = 41"}); r.Error != nil {
		t.Errorf("%+v", r.Error)
	}
	// The command line and the API share a context.
	if out, errs, code := i.cli(t, "", "code", sb.ID, "x + 1"); out != "42\n" || code != 0 {
		t.Errorf("wrenn code: %d %q %q", code, out, errs)
	}
	r := run(client.Code{Code: "import matplotlib.pyplot as plt; _ = plt.plot([3, 1, 2]); plt.show()"})
	if len(r.Results) != 1 {
		t.Fatalf("a chart: %+v", r)
	}
	if img, err := png.Decode(bytes.NewReader(r.Results[0].PNG)); err != nil || img.Bounds().Dx() < 200 {
		t.Errorf("a chart: %v", err)
	}
	if r := run(client.Code{Code: "print('before')\ndef f(): return 1 / 0\nf()"}); r.Error == nil || r.Error.Name != "ZeroDivisionError" || !strings.Contains(r.Error.Traceback, "in f()") || r.Stdout != "before\n" {
		t.Errorf("an exception: %+v", r)
	}
	if r := run(client.Code{Code: "while True: pass", TimeoutSeconds: 2}); r.Error == nil || r.Error.Name != "KeyboardInterrupt" {
		t.Errorf("an endless loop: %+v", r)
	}
	other, err := c.CreateContext(t.Context(), sb.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	if r := run(client.Code{Code: "x", ContextID: other.ID}); r.Error == nil || r.Error.Name != "NameError" {
		t.Errorf("another context's x: %+v", r)
	}
	run(client.Code{Code: "x = 'other'", ContextID: other.ID})
	if _, err := c.Pause(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Resume(t.Context(), sb.ID); err != nil {
		t.Fatal(err)
	}
	for context, want := range map[string]string{"": "41", other.ID: "'other'"} {
		if r := run(client.Code{Code: "x", ContextID: context}); len(r.Results) != 1 || r.Results[0].Text != want {
			t.Errorf("after a pause: %+v, not %s", r, want)
		}
	}
}

// Package imagetest gives tests the real kernel, initrd and minimal template. It makes
// them once per machine, and again when their inputs change.
package imagetest

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/templates"
)

// Images are what a test's virtual machines start from.
type Images struct {
	Dir     layout.Dir // of the images; a test must not write there
	Envd    string     // path of their guest daemon
	Kernel  image.KernelFiles
	Minimal image.Template
}

// prepared has the images that all tests of this process share.
var prepared struct {
	sync.Mutex
	images *Images
}

// Prepare returns images with the guest daemon of this source tree. It skips the test on
// machines that cannot make them. All tests of a process get the same images, even if the
// source tree or the package lists change while they run.
func Prepare(t testing.TB) Images {
	t.Helper()
	prepared.Lock()
	defer prepared.Unlock()
	if prepared.images == nil {
		in := prepare(t)
		prepared.images = &in
	}
	return *prepared.images
}

func prepare(t testing.TB) Images {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a root file system")
	}
	for _, tool := range []string{"apt-get", "dpkg-deb", "mmdebstrap", "mke2fs", "depmod"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s to make images", tool)
		}
	}
	cache := os.Getenv("WRENN_TEST_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(user, "wrenn-test")
	}
	in := Images{Dir: layout.Dir(cache), Envd: filepath.Join(cache, "envd")}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	if built := os.Getenv("WRENN_TEST_ENVD"); built != "" {
		in.Envd = built // for machines without Go, such as the VMs of test/lab
	} else {
		build(t, in.Envd)
	}
	var err error
	if in.Kernel, err = image.Kernel(t.Context(), in.Dir, in.Envd, func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	if in.Kernel.Stale != nil {
		t.Fatal(in.Kernel.Stale) // it may have another guest daemon than the one under test
	}
	if in.Minimal, err = image.EnsureMinimal(t.Context(), in.Dir, in.Envd, func(s string) { t.Log(s) }); err != nil {
		t.Fatal(err)
	}
	if in.Minimal.Stale != nil {
		t.Fatal(in.Minimal.Stale)
	}
	return in
}

// Interpreter returns minimal with the packages that the recipe of code-interpreter
// installs. It makes it like minimal on this machine, because an emulated guest would take
// many minutes. It has minimal's ids, but another folder.
func Interpreter(t testing.TB, in Images) image.Template {
	t.Helper()
	folder, err := templates.Folder("code-interpreter")
	if err != nil {
		t.Fatal(err)
	}
	recipe, err := fs.ReadFile(folder, "Recipe")
	if err != nil {
		t.Fatal(err)
	}
	packages := regexp.MustCompile(`python3-[a-z0-9-]+`).FindAllString(string(recipe), -1)
	if len(packages) == 0 {
		t.Fatal("the recipe installs no packages")
	}
	return With(t, in, "interpreter", image.More{Name: "code-interpreter", Packages: packages})
}

// With returns minimal with more in it, made like minimal on this machine. It has
// minimal's ids, but lies in the named folder.
func With(t testing.TB, in Images, folder string, more image.More) image.Template {
	t.Helper()
	made, err := image.EnsureMore(t.Context(), layout.Dir(filepath.Join(string(in.Dir), folder)), in.Envd, more, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// build builds the guest daemon reproducibly.
func build(t testing.TB, name string) {
	t.Helper()
	mod, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatalf("find the source tree: %v", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(name), "envd-")
	if err != nil {
		t.Fatal(err)
	}
	tmp.Close()
	defer os.Remove(tmp.Name())
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", tmp.Name(), "./cmd/envd")
	cmd.Dir = strings.TrimSpace(string(mod))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build envd: %v: %s", err, out)
	}
	if err := os.Chmod(tmp.Name(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp.Name(), name); err != nil {
		t.Fatal(err)
	}
}

package cgroup

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// tree creates the test's own tree.
func tree(t *testing.T) *Tree {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err == nil {
			tr, err := Open(filepath.Join(root, "wrenn-test-"+strings.ToLower(t.Name())))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = tr.Close(context.Background()) })
			return tr
		}
	}
	t.Skip("needs a cgroup2 mount")
	return nil
}

func start(t *testing.T, g *Group, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: g.FD()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestGroup(t *testing.T) {
	tr := tree(t)
	g, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	cmd := start(t, g, "setsid sleep 60 & exec true")
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	path := g.dir.Name()
	g.Close()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("a group with a descendant was removed: %v", err)
	}
	// Root in the guest can make groups in it.
	if err := os.MkdirAll(filepath.Join(path, "nested", "deeper"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if err := tr.await(t.Context(), "populated 0"); err != nil {
		t.Fatal(err)
	}
	g2, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("an empty group was not removed")
	}
	g2.Close()
}

func TestPrepare(t *testing.T) {
	tr := tree(t)
	tr.Prepare()
	tr.Prepare() // A group is prepared already.
	entries, err := os.ReadDir(tr.path)
	if err != nil {
		t.Fatal(err)
	}
	var groups []string
	for _, e := range entries {
		if e.IsDir() {
			groups = append(groups, e.Name())
		}
	}
	one, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	if len(groups) != 1 || one.name != groups[0] {
		t.Errorf("prepared %q, got %q", groups, one.name)
	}
	two, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	if two.name == one.name {
		t.Error("two processes share a group")
	}
	tr.Prepare()
	two.Close()
	one.Close()
	if err := tr.Close(t.Context()); err != nil {
		t.Error(err)
	}
	tr.Prepare() // A closed tree must prepare nothing.
	if _, err := os.Stat(tr.path); err == nil {
		t.Error("a closed tree exists again")
	}
}

func TestFreeze(t *testing.T) {
	tr := tree(t)
	// An empty tree freezes too.
	for _, f := range []func(context.Context) error{tr.Freeze, tr.Thaw} {
		if err := f(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	g, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	const writeAlways = "while :; do echo x; sleep 0.01; done >> "
	file := filepath.Join(t.TempDir(), "n")
	cmd := start(t, g, writeAlways+file)
	sizeOf := func(file string) int64 {
		info, err := os.Stat(file)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	size := func() int64 { return sizeOf(file) }
	// Another process does the same, outside of the tree.
	free := exec.Command("sh", "-c", writeAlways+file+".free")
	if err := free.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = free.Process.Kill()
		_ = free.Wait()
	}()
	await.Until(t, "output", func() bool { return size() > 0 })
	if err := tr.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := size()
	other := sizeOf(file + ".free")
	await.Until(t, "output of the process that is not frozen", func() bool { return sizeOf(file+".free") >= other+10 })
	if size() != before {
		t.Error("a frozen process runs")
	}
	if err := tr.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "a thawed process runs", func() bool { return size() > before })
	// Frozen processes can be killed.
	if err := tr.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tr.Close(await.Context(t)); err != nil {
		t.Errorf("close: %v", err)
	}
	_ = cmd.Wait()
}

func TestOpenElsewhere(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "x")); err == nil {
		t.Error("an ordinary folder was accepted as a cgroup")
	}
}

// Package cgroup puts users' processes into cgroups (version 2): one for each process
// that a client starts, so that all its descendants can be killed, and a tree of them
// that can be frozen for a pause.
package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is the cgroup above those of all users' processes.
type Tree struct {
	path string

	mu     sync.Mutex
	next   int
	ready  *Group // prepared for New, or nil
	closed bool
	stale  map[string]struct{} // groups whose process has ended and that may still have descendants
}

// Open creates or takes over the cgroup at path, which must be in a cgroup2 file system.
// It removes groups that an earlier daemon left there once they are empty.
func Open(path string) (*Tree, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
		return nil, fmt.Errorf("find cgroup2: %w", err)
	}
	if int64(st.Type) != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not a cgroup2 file system", filepath.Dir(path))
	}
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	t := &Tree{path: path, stale: map[string]struct{}{}}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			t.stale[e.Name()] = struct{}{}
		}
	}
	// The earlier daemon may have died between freeze and thaw.
	if err := t.write("cgroup.freeze", "0"); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *Tree) write(file, value string) error {
	if err := os.WriteFile(filepath.Join(t.path, file), []byte(value), 0); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// Group holds one process and its descendants.
type Group struct {
	tree *Tree
	name string
	dir  *os.File
}

// New returns an empty, unused group: the one that Prepare created, or a new one.
func (t *Tree) New() (*Group, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.ready; g != nil {
		t.ready = nil
		return g, nil
	}
	return t.make()
}

// Prepare creates the group that New returns next, so that starting a process does not
// wait for that. If it fails, New tries again.
func (t *Tree) Prepare() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ready != nil || t.closed {
		return
	}
	if g, err := t.make(); err == nil {
		t.ready = g
	}
}

// make creates an empty group. The caller holds t.mu.
func (t *Tree) make() (*Group, error) {
	// Retrying here to remove groups that were not empty when their process ended bounds
	// their number without a timer.
	for name := range t.stale {
		if removeTree(filepath.Join(t.path, name)) {
			delete(t.stale, name)
		}
	}
	for {
		t.next++
		name := "p" + strconv.Itoa(t.next)
		path := filepath.Join(t.path, name)
		err := os.Mkdir(path, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		// Not os.Open, which makes five more system calls to have the directory polled.
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			_ = os.Remove(path)
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		return &Group{tree: t, name: name, dir: os.NewFile(uintptr(fd), path)}, nil
	}
}

// removeTree removes a group and the groups in it. It returns false if one still has
// processes.
func removeTree(path string) bool {
	err := unix.Rmdir(path)
	if err == nil || err == unix.ENOENT {
		return true
	}
	// A directory has a link for each one in it. Most groups have none, and those of
	// background processes are tried again at each start.
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil && st.Nlink == 2 {
		return false
	}
	entries, _ := os.ReadDir(path)
	nested := false
	for _, e := range entries {
		if e.IsDir() {
			nested = true
			if !removeTree(filepath.Join(path, e.Name())) {
				return false
			}
		}
	}
	return nested && unix.Rmdir(path) == nil
}

// FD returns a descriptor of the group's directory, for CLONE_INTO_CGROUP. It is valid
// until Close.
func (g *Group) FD() int { return int(g.dir.Fd()) }

// Add moves a process into the group.
func (g *Group) Add(pid int) error {
	return os.WriteFile(filepath.Join(g.dir.Name(), "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// Kill kills every process in the group, even those that fork at the same time.
func (g *Group) Kill() error {
	return os.WriteFile(filepath.Join(g.dir.Name(), "cgroup.kill"), []byte("1"), 0)
}

// Gone reports whether the group was removed, which root in the guest can do while it is
// empty. No process can be started in it then.
func (g *Group) Gone() bool {
	_, err := os.Stat(g.dir.Name())
	return errors.Is(err, fs.ErrNotExist)
}

// Close releases the group, which is removed as soon as it is empty.
func (g *Group) Close() {
	_ = g.dir.Close()
	g.tree.mu.Lock()
	defer g.tree.mu.Unlock()
	if !removeTree(g.dir.Name()) {
		g.tree.stale[g.name] = struct{}{}
	}
}

// Freeze freezes every process in the tree and waits until all of them have stopped. If
// they have not by ctx's deadline (5 seconds if it has none), Freeze thaws them and the
// error is context.DeadlineExceeded.
func (t *Tree) Freeze(ctx context.Context) error {
	if err := t.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	if err := t.await(ctx, "frozen 1"); err != nil {
		return errors.Join(fmt.Errorf("freeze %s: %w", filepath.Base(t.path), err), t.Release())
	}
	return nil
}

// Release is [Tree.Thaw] without waiting until the processes run.
func (t *Tree) Release() error { return t.write("cgroup.freeze", "0") }

// Thaw continues the tree's processes.
func (t *Tree) Thaw(ctx context.Context) error {
	if err := t.Release(); err != nil {
		return err
	}
	if err := t.await(ctx, "frozen 0"); err != nil {
		return fmt.Errorf("thaw %s: %w", filepath.Base(t.path), err)
	}
	return nil
}

// Kill kills every process in the tree.
func (t *Tree) Kill() error { return t.write("cgroup.kill", "1") }

// Empty kills every process in the tree and returns when none is left.
func (t *Tree) Empty(ctx context.Context) error {
	if err := t.Kill(); err != nil {
		return err
	}
	if err := t.await(ctx, "populated 0"); err != nil {
		return fmt.Errorf("end users' processes: %w", err)
	}
	return nil
}

// Close kills every process in the tree and removes it.
func (t *Tree) Close(ctx context.Context) error {
	if err := t.Empty(ctx); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.ready != nil {
		_ = t.ready.dir.Close()
		t.ready = nil
	}
	if !removeTree(t.path) {
		return fmt.Errorf("remove %s: %w", t.path, unix.EBUSY)
	}
	return nil
}

// await returns when cgroup.events has the line.
func (t *Tree) await(ctx context.Context, line string) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(5 * time.Second)
	}
	fd, err := unix.Open(filepath.Join(t.path, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup.events: %w", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 512)
	for {
		n, err := unix.Pread(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		for l := range bytes.Lines(buf[:n]) {
			if string(bytes.TrimSpace(l)) == line {
				return nil
			}
		}
		left := time.Until(deadline)
		if left <= 0 {
			return context.DeadlineExceeded
		}
		// The kernel raises POLLPRI when the file changes after it was read.
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := unix.Poll(p, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for cgroup.events: %w", err)
		}
	}
}

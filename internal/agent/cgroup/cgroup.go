// Package cgroup limits the host's resources that a virtual machine's process can take,
// with control groups of version 1 or 2, whichever the host has.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/flock"
)

// parent is the group that contains all of Wrenn's groups.
const parent = "wrenn"

// root is the mount point of control groups.
const root = "/sys/fs/cgroup"

// Limits are the limits of a group. Zero means no limit.
type Limits struct {
	MemoryBytes int64
	CPUs        float64 // processors, on average over 100 ms
	PIDs        int64   // threads
	// Weight is the group's share of the processors relative to other groups, while there
	// are too few for all (0: 1).
	Weight int
}

// Group is a control group: one folder in version 2, one per controller in version 1.
// Its name is its only state, so another process can adopt it.
type Group struct {
	Name string `json:"name"`
}

// controllers of version 1, each a hierarchy of its own.
var controllers = []string{"memory", "cpu", "pids"}

// v2 reports whether the host has the unified hierarchy at root.
func v2() bool {
	_, err := os.Stat(filepath.Join(root, "cgroup.controllers"))
	return err == nil
}

// dirs returns the group's folders.
func (g Group) dirs() []string {
	if v2() {
		return []string{filepath.Join(root, parent, g.Name)}
	}
	dirs := make([]string, len(controllers))
	for i, c := range controllers {
		dirs[i] = filepath.Join(root, c, parent, g.Name)
	}
	return dirs
}

// Available returns an error if the host lacks a controller that groups need.
func Available() error {
	if v2() {
		b, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, c := range controllers {
			if !strings.Contains(" "+string(b), " "+c) {
				return fmt.Errorf("control groups lack the controller %s", c)
			}
		}
		return nil
	}
	for _, c := range controllers {
		if _, err := os.Stat(filepath.Join(root, c, "tasks")); err != nil {
			return fmt.Errorf("control groups lack the controller %s: %w", c, err)
		}
	}
	return nil
}

// Create makes a group with limits. It fails if a group of this name exists.
func Create(name string, l Limits) (g Group, err error) {
	if name == "" || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return Group{}, fmt.Errorf("make control group: bad name %q", name)
	}
	g = Group{Name: name}
	var made []string // not those of a group that existed before
	defer func() {
		if err != nil {
			err = fmt.Errorf("make control group: %w", err)
			for _, dir := range made {
				err = errors.Join(err, os.Remove(dir))
			}
		}
	}()
	for _, dir := range g.dirs() {
		if err := mkdir(dir); err != nil {
			return g, err
		}
		made = append(made, dir)
	}
	return g, g.limit(l)
}

// mkdir makes a group's folder, and the parent's if it is missing.
func mkdir(dir string) error {
	unlock, err := lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if v2() {
		if err := delegate(); err != nil {
			return err
		}
	}
	return os.Mkdir(dir, 0o755)
}

// lock keeps other agents on this machine from making or removing the parent.
func lock() (unlock func(), err error) {
	f, err := flock.Lock(context.Background(), root) // others hold it for a few system calls only
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// delegate enables the controllers for the groups in the parent. It gives the parent half
// of the default weight, so that guests leave more of the processors to the host's
// services. (In version 1, each thread of a service weighs as much as the parent anyway.)
func delegate() error {
	if err := delegateControllers(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, parent, "cpu.weight"), []byte(strconv.Itoa(weightUnit/2)), 0)
}

func delegateControllers() error {
	for _, dir := range []string{root, filepath.Join(root, parent)} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+memory +cpu +pids"), 0); err != nil {
			return err
		}
	}
	return nil
}

// weightUnit and sharesUnit are the kernel's defaults, in versions 2 and 1, and stand for
// a weight of 1. Version 2 allows at most 100 times that.
const (
	weightUnit = 100
	sharesUnit = 1024
	maxWeight  = 100
)

func (g Group) limit(l Limits) error {
	const period = 100_000 // µs
	set := func(controller, file, value string) error {
		dir := filepath.Join(root, parent, g.Name)
		if !v2() {
			dir = filepath.Join(root, controller, parent, g.Name)
		}
		return os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
	}
	if l.MemoryBytes > 0 {
		file := "memory.max"
		if !v2() {
			file = "memory.limit_in_bytes"
		}
		if err := set("memory", file, strconv.FormatInt(l.MemoryBytes, 10)); err != nil {
			return err
		}
	}
	if l.CPUs > 0 {
		quota := strconv.FormatInt(int64(l.CPUs*period), 10)
		var err error
		if v2() {
			err = set("cpu", "cpu.max", quota+" "+strconv.Itoa(period))
		} else {
			err = errors.Join(set("cpu", "cpu.cfs_period_us", strconv.Itoa(period)), set("cpu", "cpu.cfs_quota_us", quota))
		}
		if err != nil {
			return err
		}
	}
	if err := g.setWeight(float64(l.Weight)); err != nil {
		return err
	}
	if l.PIDs > 0 {
		return set("pids", "pids.max", strconv.FormatInt(l.PIDs, 10))
	}
	return nil
}

// SetWeight changes the group's weight (see [Limits]), which need not be whole.
func (g Group) SetWeight(weight float64) error {
	if err := g.setWeight(weight); err != nil {
		return fmt.Errorf("set the weight of control group: %w", err)
	}
	return nil
}

func (g Group) setWeight(weight float64) error {
	if weight == 0 {
		weight = 1
	}
	path, unit := filepath.Join(root, parent, g.Name, "cpu.weight"), float64(weightUnit)
	if !v2() {
		path, unit = filepath.Join(root, "cpu", parent, g.Name, "cpu.shares"), sharesUnit
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0) // not created: that is EACCES if the file is missing
	if err != nil {
		return err
	}
	value := max(int(min(weight, maxWeight)*unit), 2) // 2 is the least of version 1
	_, err = f.WriteString(strconv.Itoa(value))
	return errors.Join(err, f.Close())
}

// AddThread moves a thread of this process into the group, so that the processes it
// starts are in the group too. It does nothing with version 2, whose groups do not take
// single threads; use the descriptor from Open there.
func (g Group) AddThread(tid int) error {
	if v2() {
		return nil
	}
	return attachThread(g.dirs(), tid)
}

// LeaveThread moves a thread of this process back to the root group.
func LeaveThread(tid int) error {
	if v2() {
		return nil
	}
	dirs := make([]string, len(controllers))
	for i, c := range controllers {
		dirs[i] = filepath.Join(root, c)
	}
	return attachThread(dirs, tid)
}

func attachThread(dirs []string, tid int) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "tasks"), []byte(strconv.Itoa(tid)), 0); err != nil {
			return fmt.Errorf("move thread to control group: %w", err)
		}
	}
	return nil
}

// Open opens the group's folder for SysProcAttr.CgroupFD. It returns nil with version 1.
func (g Group) Open() (*os.File, error) {
	if !v2() {
		return nil, nil
	}
	return os.Open(g.dirs()[0])
}

// Memory returns the bytes of the host's memory that the group's processes take.
func (g Group) Memory() (int64, error) {
	name := filepath.Join(g.dirs()[0], "memory.current")
	if !v2() {
		name = filepath.Join(g.dirs()[0], "memory.usage_in_bytes")
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, fmt.Errorf("read memory of control group: %w", err)
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// Populated reports whether the group exists and has processes.
func (g Group) Populated() (bool, error) {
	pids, err := g.pids()
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list processes of control group: %w", err)
	}
	return len(pids) > 0, nil
}

// pids returns the processes in the group.
func (g Group) pids() ([]int, error) {
	b, err := os.ReadFile(filepath.Join(g.dirs()[0], "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for f := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Destroy kills every process in the group, waits until they are gone, and removes the
// group. It is idempotent.
func (g Group) Destroy(ctx context.Context) error {
	for {
		pids, err := g.pids()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("destroy control group: %w", err)
		}
		for _, pid := range pids {
			if pid == os.Getpid() {
				continue // a thread between AddThread and LeaveThread
			}
			if err := killAndWait(ctx, pid); err != nil {
				return fmt.Errorf("destroy control group: %w", err)
			}
		}
		err = g.removeDirs()
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("destroy control group: %w", err)
		}
		// Poll: a dead process keeps its group busy until its parent has reaped it, and
		// version 1 has no event for that.
		select {
		case <-ctx.Done():
			return fmt.Errorf("destroy control group: %w", errors.Join(err, ctx.Err()))
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// killAndWait kills a process of the group and waits for its end.
func killAndWait(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil // gone, or a thread, which dies with its process
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
	return ctx.Err()
}

func (g Group) removeDirs() error {
	var errs []error
	for _, dir := range g.dirs() {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Confine puts a process back into the group, and makes the group with its limits again
// if it is gone. repaired reports whether either was necessary.
func (g Group) Confine(pid int, l Limits) (repaired bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("put process %d back into control group: %w", pid, err)
		}
	}()
	in, err := g.has(pid)
	if err != nil || in {
		return false, err
	}
	// The group may be gone because the sandbox is ending. Then nobody else would remove
	// the new one.
	defer func() {
		if err == nil {
			return
		}
		if e := g.removeDirs(); !errors.Is(e, unix.EBUSY) {
			err = errors.Join(err, e)
		}
		err = errors.Join(err, RemoveParent())
	}()
	for _, dir := range g.dirs() {
		if err := mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
			return false, err
		}
	}
	if err := g.limit(l); err != nil {
		return false, err
	}
	for _, dir := range g.dirs() {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return false, err
		}
	}
	return true, nil
}

// has reports whether a process is in the group, in each hierarchy.
func (g Group) has(pid int) (bool, error) {
	for _, dir := range g.dirs() {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if !slices.Contains(strings.Fields(string(b)), strconv.Itoa(pid)) {
			return false, nil
		}
	}
	return true, nil
}

// Folders returns the folders that contain Wrenn's groups.
func Folders() []string { return Group{}.dirs() }

// RemoveParent removes the parent group unless it still contains a group.
func RemoveParent() error {
	unlock, err := lock()
	if err != nil {
		return fmt.Errorf("remove control group: %w", err)
	}
	defer unlock()
	for _, dir := range (Group{}).dirs() {
		err := os.Remove(filepath.Clean(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("remove control group: %w", err)
		}
	}
	return nil
}

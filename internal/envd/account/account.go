// Package account looks up the guest's users, resolves their paths, and runs code with
// their rights.
package account

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/nametext"
)

// ErrUnknown means that the guest has no such user or group.
var ErrUnknown = errors.New("no such user")

// Account is one user of the guest.
type Account struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // every group, the primary one first
	Home   string
	Shell  string
}

// Lookup finds a user by name, or by uid if no user has the number for a name. It
// reads the tables again if they changed. An image may have none, so, as in container
// runtimes, root always exists, an unknown uid has root's group and the home "/", and
// a group after a colon, by name or number, is the user's only one.
func Lookup(name string) (*Account, error) { return known.lookup(name) }

var known = cache{passwd: "/etc/passwd", group: "/etc/group", unchangedFor: time.Second}

func lookup(name, passwd, group string) (*Account, error) {
	user, in, ok := strings.Cut(name, ":")
	a, err := lookupUser(user, passwd, group)
	if err != nil || !ok {
		return a, err
	}
	gid, err := lookupGroup(in, group)
	if err != nil {
		return nil, err
	}
	a.GID, a.Groups = gid, []uint32{gid}
	return a, nil
}

// lookupGroup finds a group by name, or by number if no group has that name.
func lookupGroup(name, group string) (gid uint32, err error) {
	n, err := strconv.ParseUint(name, 10, 32)
	// The number that stands for "unchanged" (chown(2)) is nobody's.
	gid, found := uint32(n), err == nil && n != 1<<32-1
	err = eachLine(group, func(f []string) bool {
		if len(f) < 3 || f[0] != name {
			return true
		}
		n, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil {
			gid, found = uint32(n), true
		}
		return err != nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("look up group %q: %w", name, err)
	}
	if !found {
		return 0, fmt.Errorf("group %q: %w", name, ErrUnknown)
	}
	return gid, nil
}

func lookupUser(name, passwd, group string) (*Account, error) {
	if name == "" || strings.ContainsAny(name, ":\n\x00") {
		return nil, fmt.Errorf("user %q: %w", name, ErrUnknown)
	}
	var byName, byID *Account
	err := eachLine(passwd, func(f []string) bool {
		if len(f) < 7 || (f[0] != name && f[2] != name) {
			return true
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return true
		}
		a := &Account{Name: f[0], UID: uint32(uid), GID: uint32(gid), Home: f[5], Shell: f[6]}
		if f[0] == name {
			byName = a
			return false
		}
		if byID == nil {
			byID = a
		}
		return true
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look up user %q: %w", name, err)
	}
	a := byName
	if a == nil {
		a = byID
	}
	if a == nil {
		a = unlisted(name)
	}
	if a == nil {
		return nil, fmt.Errorf("user %q: %w", name, ErrUnknown)
	}
	if !path.IsAbs(a.Home) {
		a.Home = "/"
	}
	a.Groups = []uint32{a.GID}
	err = eachLine(group, func(f []string) bool {
		if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), a.Name) {
			return true
		}
		if gid, err := strconv.ParseUint(f[2], 10, 32); err == nil && !slices.Contains(a.Groups, uint32(gid)) {
			a.Groups = append(a.Groups, uint32(gid))
		}
		return true
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look up groups of user %q: %w", name, err)
	}
	return a, nil
}

// unlisted returns the account for a user that is not in the table, or nil.
func unlisted(name string) *Account {
	if name == "root" || name == "0" {
		return &Account{Name: "root", Home: "/root"}
	}
	// The number that stands for "unchanged" (chown(2)) is nobody's.
	uid, err := strconv.ParseUint(name, 10, 32)
	if err != nil || uid == 1<<32-1 {
		return nil
	}
	return &Account{Name: name, UID: uint32(uid), Home: "/"}
}

// eachLine calls f with the colon-separated fields of each line of a file
// until f returns false.
func eachLine(file string, f func([]string) bool) error {
	r, err := os.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	s := bufio.NewScanner(io.LimitReader(r, 16<<20))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if !f(strings.Split(s.Text(), ":")) {
			return nil
		}
	}
	return s.Err()
}

// Names translates numeric owners to names.
type Names struct {
	users, groups map[uint32]string
}

// LoadNames reads the guest's tables. Owners that are not in them stay numbers.
func LoadNames() *Names {
	n := &Names{users: map[uint32]string{}, groups: map[uint32]string{}}
	for file, m := range map[string]map[uint32]string{"/etc/passwd": n.users, "/etc/group": n.groups} {
		_ = eachLine(file, func(f []string) bool {
			if len(f) < 3 {
				return true
			}
			if id, err := strconv.ParseUint(f[2], 10, 32); err == nil {
				if _, ok := m[uint32(id)]; !ok {
					m[uint32(id)] = f[0]
				}
			}
			return true
		})
	}
	return n
}

// User returns the name of uid.
func (n *Names) User(uid uint32) string { return name(n.users, uid) }

// Group returns the name of gid.
func (n *Names) Group(gid uint32) string { return name(n.groups, gid) }

func name(m map[uint32]string, id uint32) string {
	if s, ok := m[id]; ok {
		return s
	}
	return strconv.FormatUint(uint64(id), 10)
}

// Resolve returns the absolute, clean path for p, which a client encoded with package
// nametext. A relative path, and "~", start at the user's home; an empty path is the home.
func (a *Account) Resolve(p string) (string, error) {
	if strings.ContainsRune(p, 0) {
		return "", fmt.Errorf("path has a NUL byte: %w", fs.ErrInvalid)
	}
	p = nametext.Name(p)
	if rest, ok := strings.CutPrefix(p, "~"); ok && (rest == "" || rest[0] == '/') {
		p = "." + rest
	}
	if !path.IsAbs(p) {
		p = path.Join(a.Home, p)
	}
	return path.Clean(p), nil
}

// Do calls f with the user's rights: on a thread with the user's effective uid and gid
// and supplementary groups, and without effective capabilities. f must do its work on the
// calling goroutine. Files that it opens keep the rights with which they were opened.
//
// The thread's real and saved uid stay root's, so the user can neither signal nor trace
// it, and it can restore its rights.
func (a *Account) Do(f func() error) error {
	euid := uint32(unix.Geteuid())
	if euid == a.UID {
		return f()
	}
	if euid != 0 {
		return fmt.Errorf("act as user %s: %w", a.Name, fs.ErrPermission)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	back, err := a.become()
	if err != nil {
		return err
	}
	defer back()
	return f()
}

// become gives the calling thread, which must be locked and run as root, the user's
// rights. It uses raw system calls, because those of the standard library change every
// thread of the process.
func (a *Account) become() (back func(), err error) {
	groups, err := unix.Getgroups()
	if err != nil {
		return nil, fmt.Errorf("read the daemon's groups: %w", err)
	}
	own := make([]uint32, len(groups))
	for i, g := range groups {
		own[i] = uint32(g)
	}
	egid := uint32(unix.Getegid())
	back = func() {
		// A thread that cannot restore its rights must not run anything else. This does not
		// happen, because root's real and saved ids allow these calls.
		for _, err := range []error{seteuid(0), setegid(egid), setgroups(own)} {
			if err != nil {
				panic(fmt.Sprintf("account: take root's rights back: %v", err))
			}
		}
	}
	err = setgroups(a.Groups)
	if err == nil {
		err = setegid(a.GID)
	}
	if err == nil {
		err = seteuid(a.UID)
	}
	if err != nil {
		back()
		return nil, fmt.Errorf("act as user %s: %w", a.Name, err)
	}
	return back, nil
}

const keep = ^uintptr(0) // leaves an id unchanged

func seteuid(id uint32) error { return raw(unix.SYS_SETRESUID, keep, uintptr(id), keep) }

func setegid(id uint32) error { return raw(unix.SYS_SETRESGID, keep, uintptr(id), keep) }

func setgroups(g []uint32) error {
	if len(g) == 0 {
		return raw(unix.SYS_SETGROUPS, 0, 0, 0)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(g)), uintptr(unsafe.Pointer(&g[0])), 0); e != 0 {
		return e
	}
	return nil
}

func raw(call, a, b, c uintptr) error {
	if _, _, e := unix.RawSyscall(call, a, b, c); e != 0 {
		return e
	}
	return nil
}

type contextKey struct{}

// NewContext returns a copy of ctx with the user of a request.
func NewContext(ctx context.Context, a *Account) context.Context {
	return context.WithValue(ctx, contextKey{}, a)
}

// FromContext returns the user that NewContext put into ctx.
func FromContext(ctx context.Context) (*Account, error) {
	a, ok := ctx.Value(contextKey{}).(*Account)
	if !ok {
		return nil, fmt.Errorf("request without a user: %w", ErrUnknown)
	}
	return a, nil
}

package account

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func tables(t *testing.T) (passwd, group string) {
	t.Helper()
	dir := t.TempDir()
	passwd, group = filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	for file, text := range map[string]string{
		passwd: "root:x:0:0:root:/root:/bin/bash\nbroken:x:y:z::/:\nshort:x\n\nuser:x:1000:1000::/home/user:/bin/bash\n1000:x:7:7::relative:/bin/sh\n",
		group:  "root:x:0:\nsudo:x:27:user,other\nuser:x:1000:user\nbad:x:no:user\nvideo:x:44:nouser\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return passwd, group
}

func TestLookup(t *testing.T) {
	passwd, group := tables(t)
	a, err := lookup("user", passwd, group)
	if err != nil {
		t.Fatal(err)
	}
	if a.UID != 1000 || a.GID != 1000 || a.Home != "/home/user" || a.Shell != "/bin/bash" || !slices.Equal(a.Groups, []uint32{1000, 27}) {
		t.Errorf("user is %+v", a)
	}
	// A name takes precedence over a number.
	if a, err = lookup("1000", passwd, group); err != nil || a.UID != 7 || a.Home != "/" {
		t.Errorf("1000 is %+v, %v", a, err)
	}
	if a, err = lookup("0", passwd, group); err != nil || a.Name != "root" {
		t.Errorf("0 is %+v, %v", a, err)
	}
	// A group by name, by number, and by a number without a name.
	for in, gid := range map[string]uint32{"sudo": 27, "27": 27, "4711": 4711, "bad": 0} {
		a, err := lookup("user:"+in, passwd, group)
		if in == "bad" {
			if !errors.Is(err, ErrUnknown) {
				t.Errorf("user:bad is %+v, %v", a, err)
			}
		} else if err != nil || a.UID != 1000 || a.GID != gid || !slices.Equal(a.Groups, []uint32{gid}) {
			t.Errorf("user:%s is %+v, %v", in, a, err)
		}
	}
	for _, name := range []string{":", "user:", ":user", "user:user:user", "", "nobody", "broken", "short", "us", "user:x", "user\n", "user\x00", "y"} {
		if a, err := lookup(name, passwd, group); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q is %+v, %v", name, a, err)
		}
	}
}

func TestCache(t *testing.T) {
	passwd, group := tables(t)
	c := &cache{passwd: passwd, group: group}
	see := func(want uint32, groups ...uint32) {
		t.Helper()
		a, err := c.lookup("user")
		if err != nil || a.UID != want || !slices.Equal(a.Groups, groups) {
			t.Errorf("user is %+v, %v, want %d and %d", a, err, want, groups)
		}
		a.Groups[0] = 4711 // The caller owns it.
	}
	see(1000, 1000, 27)
	if _, ok := c.kept["user"]; !ok {
		t.Error("the cache lost an account although the tables have not changed")
	}
	see(1000, 1000, 27)
	// Any change of either table counts, whatever its length and time, and so does a
	// removal.
	was, err := os.Stat(passwd)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(file, from, to string) {
		t.Helper()
		b, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file+".new", []byte(strings.ReplaceAll(string(b), from, to)), 0o600)
		}
		if err == nil {
			err = os.Chtimes(file+".new", was.ModTime(), was.ModTime())
		}
		if err == nil {
			err = os.Rename(file+".new", file)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	replace(passwd, "user:x:1000:", "user:x:1001:")
	see(1001, 1000, 27)
	replace(group, "sudo:x:27:user", "sudo:x:28:user")
	see(1001, 1000, 28)
	replace(passwd, "user:x:1001:", "gone:x:1001:")
	if a, err := c.lookup("user"); !errors.Is(err, ErrUnknown) {
		t.Errorf("a user who was removed is %+v, %v", a, err)
	}
	for i := range 2 * maxKept {
		if _, err := c.lookup(fmt.Sprint(2000 + i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.kept) > maxKept {
		t.Errorf("%d accounts are cached", len(c.kept))
	}
	// Tables that have just changed could change again with the same timestamp.
	c = &cache{passwd: passwd, group: group, unchangedFor: time.Hour}
	if _, err := c.lookup("root"); err != nil || len(c.kept) != 0 {
		t.Errorf("%v; cached: %v", err, c.kept)
	}
}

func TestLookupUnlisted(t *testing.T) {
	passwd, group := tables(t)
	none := filepath.Join(t.TempDir(), "none")
	for _, tables := range [][2]string{{passwd, group}, {none, none}, {none, group}} {
		a, err := lookup("4711", tables[0], tables[1])
		if err != nil || a.Name != "4711" || a.UID != 4711 || a.GID != 0 || a.Home != "/" || !slices.Equal(a.Groups, []uint32{0}) {
			t.Errorf("4711 is %+v, %v", a, err)
		}
		for _, name := range []string{"root", "0"} {
			if a, err := lookup(name, tables[0], tables[1]); err != nil || a.Name != "root" || a.UID != 0 || a.Home != "/root" {
				t.Errorf("%s is %+v, %v", name, a, err)
			}
		}
		for _, name := range []string{"4294967295", "4294967296", "-1", "+1", "1e3", "nobody"} {
			if a, err := lookup(name, tables[0], tables[1]); !errors.Is(err, ErrUnknown) {
				t.Errorf("%s is %+v, %v", name, a, err)
			}
		}
	}
}

func TestResolve(t *testing.T) {
	a := &Account{Home: "/home/user"}
	for in, want := range map[string]string{
		"": "/home/user", "~": "/home/user", "~/": "/home/user", "~/a/../b": "/home/user/b", "a": "/home/user/a",
		"./a//b/": "/home/user/a/b", "../../..": "/", "/": "/", "/a/../../b": "/b", "~root": "/home/user/~root", "/~": "/~",
	} {
		if got, err := a.Resolve(in); err != nil || got != want {
			t.Errorf("%q is %q, %v, not %q", in, got, err, want)
		}
	}
	for _, in := range []string{"\x00", "/a\x00b", "~/\x00"} {
		if _, err := a.Resolve(in); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzResolve(f *testing.F) {
	for _, s := range []string{"", "~", "~/..", "a/../../b", "/..", "\x00", "//"} {
		f.Add(s)
	}
	a := &Account{Home: "/home/user"}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := a.Resolve(in)
		if strings.ContainsRune(in, 0) != (err != nil) {
			t.Fatalf("%q: %v", in, err)
		}
		if err == nil && (!filepath.IsAbs(got) || filepath.Clean(got) != got || strings.Contains(got+"/", "/../")) {
			t.Fatalf("%q is %q", in, got)
		}
	})
}

func nobody(t *testing.T) *Account {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts as another user")
	}
	a, err := Lookup("nobody")
	if err != nil {
		t.Skip("needs the user nobody: ", err)
	}
	return a
}

func TestDo(t *testing.T) {
	a := nobody(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	failed := errors.New("failed")
	if err := a.Do(func() error { return failed }); err != failed {
		t.Errorf("the error became %v", err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				err := a.Do(func() error {
					if uid, gid := unix.Geteuid(), unix.Getegid(); uint32(uid) != a.UID || uint32(gid) != a.GID {
						return fmt.Errorf("it runs as %d:%d", uid, gid)
					}
					if g, err := unix.Getgroups(); err != nil || len(g) != len(a.Groups) {
						return fmt.Errorf("it has groups %v, %v", g, err)
					}
					if _, err := os.ReadFile(secret); !errors.Is(err, fs.ErrPermission) {
						return fmt.Errorf("it can read root's file: %v", err)
					}
					if _, err := os.ReadFile("/proc/self/environ"); !errors.Is(err, fs.ErrPermission) {
						return fmt.Errorf("it can read the daemon's environment: %v", err)
					}
					if err := os.Chown(secret, int(a.UID), int(a.GID)); err == nil {
						return errors.New("it can take root's file")
					}
					// A nested Do as the same user works; as another user it is refused.
					if err := a.Do(func() error { return nil }); err != nil {
						return err
					}
					if err := (&Account{Name: "root"}).Do(func() error { return nil }); !errors.Is(err, fs.ErrPermission) {
						return fmt.Errorf("it becomes root: %v", err)
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				if _, err := os.ReadFile(secret); err != nil {
					t.Errorf("the daemon did not get its rights back: %v", err)
				}
			}
		})
	}
	all.Wait()
}

func TestDoPanic(t *testing.T) {
	a := nobody(t)
	func() {
		defer func() { recover() }()
		_ = a.Do(func() error { panic("x") })
	}()
	if unix.Geteuid() != 0 {
		t.Error("a panic left the thread without its rights")
	}
}

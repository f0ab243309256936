package account

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxKept bounds the cached accounts.
const maxKept = 64

// cache caches accounts until one of the two tables changes.
type cache struct {
	passwd, group string
	// unchangedFor is how long a table must be unchanged before accounts are cached, because
	// two changes within one tick of the kernel's clock leave the same time.
	unchangedFor time.Duration

	mu   sync.Mutex
	of   [2]version // the tables that kept is of
	kept map[string]Account
}

// version identifies the content of a file. It is zero if the file does not exist.
type version struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

func versionOf(file string) version {
	var st unix.Stat_t
	if unix.Stat(file, &st) != nil {
		return version{}
	}
	return version{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}

func (c *cache) lookup(name string) (*Account, error) {
	// Taken before the tables are read, so that the next lookup notices a change.
	of := [2]version{versionOf(c.passwd), versionOf(c.group)}
	c.mu.Lock()
	if c.of != of {
		c.of, c.kept = of, nil
	}
	a, ok := c.kept[name]
	c.mu.Unlock()
	if ok {
		a.Groups = slices.Clone(a.Groups)
		return &a, nil
	}
	found, err := lookup(name, c.passwd, c.group)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	for _, v := range of {
		// If the clock was set back, the age is negative, and nothing is cached.
		if age := now.Sub(time.Unix(v.ctime.Unix())); age < c.unchangedFor {
			return found, nil
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == of {
		if c.kept == nil || len(c.kept) >= maxKept {
			c.kept = make(map[string]Account)
		}
		keep := *found
		keep.Groups = slices.Clone(found.Groups)
		c.kept[name] = keep
	}
	return found, nil
}

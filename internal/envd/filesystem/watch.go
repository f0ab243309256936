package filesystem

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	"github.com/wrenn-dev/wrenn/internal/envd/upload"
	pb "github.com/wrenn-dev/wrenn/internal/gen/filesystem"
	"github.com/wrenn-dev/wrenn/internal/nametext"
)

// watched has the changes in a directory that are reported, and the changes to the
// directory itself that the watcher needs.
const watched = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW | unix.IN_EXCL_UNLINK

var errLost = connect.NewError(connect.CodeDataLoss, errors.New("events came faster than the client read them; some are lost"))

// watcher reports changes below a directory. It uses inotify directly, because inotify's
// cookies connect the two events of a rename. That keeps the paths of a recursive watch
// right, and lets an upload, which ends with a rename, appear as a write.
type watcher struct {
	who          *account.Account
	root         string
	recursive    bool
	includeEntry bool
	file         *os.File // the inotify instance
	dirs         map[int32]string
	byPath       map[string]int32
}

// watch starts watching root, with the rights of the calling thread, which must be who's.
func watch(who *account.Account, root string, recursive, includeEntry bool) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	w := &watcher{
		who: who, root: root, recursive: recursive, includeEntry: includeEntry,
		file: os.NewFile(uintptr(fd), "inotify"),
		dirs: map[int32]string{}, byPath: map[string]int32{},
	}
	if err := w.add(root, nil); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// Close stops the watch and ends run.
func (w *watcher) Close() { _ = w.file.Close() }

// inotify calls f with the instance's descriptor, and keeps it open until f returns.
func (w *watcher) inotify(f func(fd int) error) error {
	c, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := c.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// add watches dir and, in a recursive watch, the directories below it. It calls found, if
// not nil, for each existing entry.
func (w *watcher) add(dir string, found func(path string)) error {
	var wd int
	err := w.inotify(func(fd int) (err error) {
		wd, err = unix.InotifyAddWatch(fd, dir, watched)
		return err
	})
	if err != nil {
		if errors.Is(err, unix.ENOSPC) {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("watch %s: the machine has no watches left", dir))
		}
		return &fs.PathError{Op: "watch", Path: dir, Err: err}
	}
	// A renamed directory keeps its watch descriptor.
	if old, ok := w.dirs[int32(wd)]; ok {
		delete(w.byPath, old)
	}
	w.dirs[int32(wd)], w.byPath[dir] = dir, int32(wd)
	if !w.recursive {
		return nil
	}
	children, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, c := range children {
		path := filepath.Join(dir, c.Name())
		if found != nil {
			found(path)
		}
		if !c.IsDir() || pseudo(path) {
			continue
		}
		err := w.add(path, found)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
	}
	return nil
}

// pseudo reports whether path is in one of the kernel's file systems. A watch of the whole
// system must not descend into the files of every process.
func pseudo(path string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false
	}
	switch int64(st.Type) {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC,
		unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC:
		return true
	}
	return false
}

// forget stops watching dir and everything below it.
func (w *watcher) forget(dir string) {
	for wd, path := range w.dirs {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			_ = w.inotify(func(fd int) error {
				_, err := unix.InotifyRmWatch(fd, uint32(wd))
				return err
			})
			delete(w.dirs, wd)
			delete(w.byPath, path)
		}
	}
}

// run calls tell for each event until tell returns false or the watch is closed, and then
// returns nil, or until the watch fails. Call it once.
func (w *watcher) run(tell func(*pb.FilesystemEvent) bool) error {
	buf := make([]byte, 64<<10)
	// The upload whose temporary file was just renamed away, by the rename's cookie.
	var cookie uint32
	var uploaded upload.Kind
	for {
		n, err := w.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read file events: %w", err)
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			ev := *(*unix.InotifyEvent)(unsafe.Pointer(&b[0]))
			end := unix.SizeofInotifyEvent + int(ev.Len)
			name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:end]), "\x00")
			b = b[end:]

			if ev.Mask&unix.IN_Q_OVERFLOW != 0 {
				return errLost
			}
			dir, ok := w.dirs[ev.Wd]
			if !ok {
				continue
			}
			if ev.Mask&unix.IN_IGNORED != 0 {
				delete(w.dirs, ev.Wd)
				if w.byPath[dir] == ev.Wd {
					delete(w.byPath, dir)
				}
				continue
			}
			if ev.Mask&unix.IN_DELETE_SELF != 0 {
				// Except for the root, the parent's event reports this.
				if dir == w.root && !tell(w.event(dir, pb.EventType_EVENT_TYPE_REMOVE)) {
					return nil
				}
				continue
			}
			if name == "" {
				continue // the directory's own attributes, which its parent's event reports
			}
			path := filepath.Join(dir, name)
			if kind, ok := upload.KindOf(name); ok {
				if ev.Mask&unix.IN_MOVED_FROM != 0 {
					cookie, uploaded = ev.Cookie, kind
				}
				continue
			}
			var types []pb.EventType
			switch {
			case ev.Mask&unix.IN_MOVED_TO != 0 && ev.Cookie == cookie && cookie != 0:
				if uploaded == upload.Fresh {
					types = append(types, pb.EventType_EVENT_TYPE_CREATE)
				}
				types = append(types, pb.EventType_EVENT_TYPE_WRITE)
				cookie = 0
			case ev.Mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
				types = append(types, pb.EventType_EVENT_TYPE_CREATE)
			case ev.Mask&unix.IN_MODIFY != 0:
				types = append(types, pb.EventType_EVENT_TYPE_WRITE)
			case ev.Mask&unix.IN_ATTRIB != 0:
				types = append(types, pb.EventType_EVENT_TYPE_CHMOD)
			case ev.Mask&unix.IN_DELETE != 0:
				types = append(types, pb.EventType_EVENT_TYPE_REMOVE)
			case ev.Mask&unix.IN_MOVED_FROM != 0:
				types = append(types, pb.EventType_EVENT_TYPE_RENAME)
			}
			for _, t := range types {
				if !tell(w.event(path, t)) {
					return nil
				}
			}
			if !w.recursive || ev.Mask&unix.IN_ISDIR == 0 {
				continue
			}
			switch {
			case ev.Mask&unix.IN_MOVED_FROM != 0:
				w.forget(path)
			case ev.Mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
				var found []string
				note := func(p string) { found = append(found, p) }
				if ev.Mask&unix.IN_MOVED_TO != 0 {
					note = nil // the contents of a renamed directory are not new
				}
				err := w.who.Do(func() error { return w.add(path, note) })
				if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.ENOTDIR) {
					return err
				}
				// Entries that were created before the new directory was watched.
				for _, p := range found {
					if !tell(w.event(p, pb.EventType_EVENT_TYPE_CREATE)) {
						return nil
					}
				}
			}
		}
	}
}

func (w *watcher) event(path string, t pb.EventType) *pb.FilesystemEvent {
	name, err := filepath.Rel(w.root, path)
	if err != nil {
		name = path
	}
	e := &pb.FilesystemEvent{Name: nametext.Text(name), Type: t}
	if w.includeEntry {
		_ = w.who.Do(func() error {
			if info, err := entry(account.LoadNames(), path); err == nil {
				e.Entry = info
			}
			return nil
		})
	}
	return e
}

const (
	maxPollers = 128    // polling watchers in the guest
	maxQueued  = 10_000 // queued events of one of them
	// idlePoller is how long nobody must have polled a watcher before it may be dropped in
	// favour of a new one.
	idlePoller = 10 * time.Minute
)

// pollers has the watchers of clients that poll.
type pollers struct {
	mu   sync.Mutex
	byID map[string]*poller
}

type poller struct {
	w    *watcher
	done chan struct{} // closed when run has returned

	mu     sync.Mutex
	events []*pb.FilesystemEvent
	lost   bool  // events were dropped; reported once
	err    error // why the watch has ended; reported at each poll
	used   time.Time
}

func (ps *pollers) add(w *watcher) (string, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if len(ps.byID) >= maxPollers && !ps.dropIdle() {
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("there are %d watchers already", maxPollers))
	}
	id := rand.Text()
	p := &poller{w: w, done: make(chan struct{}), used: time.Now()}
	ps.byID[id] = p
	go p.run()
	return id, nil
}

// dropIdle drops the watcher that has been idle for longest, if long enough.
func (ps *pollers) dropIdle() bool {
	var oldest string
	since := time.Now().Add(-idlePoller)
	for id, p := range ps.byID {
		p.mu.Lock()
		if p.used.Before(since) {
			oldest, since = id, p.used
		}
		p.mu.Unlock()
	}
	if oldest == "" {
		return false
	}
	ps.byID[oldest].w.Close() // ends its goroutine, too
	delete(ps.byID, oldest)
	return true
}

// get finds a watcher that belongs to the request's user.
func (ps *pollers) get(ctx context.Context, id string, remove bool) (*poller, error) {
	who, err := account.FromContext(ctx)
	if err != nil {
		return nil, connect.NewError(connect.CodeUnauthenticated, err)
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.byID[id]
	if p == nil || p.w.who.UID != who.UID {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no watcher %q", id))
	}
	if remove {
		delete(ps.byID, id)
	}
	return p, nil
}

func (ps *pollers) close() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for id, p := range ps.byID {
		p.stop()
		delete(ps.byID, id)
	}
}

func (p *poller) run() {
	defer close(p.done)
	err := p.w.run(func(e *pb.FilesystemEvent) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.events) >= maxQueued {
			p.events, p.lost = nil, true
		}
		p.events = append(p.events, e)
		return true
	})
	if err != nil {
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
	}
}

func (p *poller) take() ([]*pb.FilesystemEvent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
	if p.lost {
		p.lost = false
		return nil, errLost // the next call returns the rest
	}
	if len(p.events) == 0 {
		return nil, fault.Connect(p.err)
	}
	events := p.events
	p.events = nil
	return events, nil
}

func (p *poller) stop() {
	p.w.Close()
	<-p.done
}

const defaultKeepalive = 90 * time.Second

// keepalive returns the interval at which a stream's client wants keepalive messages.
func keepalive(h http.Header) (time.Duration, error) {
	v := h.Get("Keepalive-Ping-Interval")
	if v == "" {
		return defaultKeepalive, nil
	}
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || !(f >= 0 && f <= 365*24*3600) {
		return 0, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("header Keepalive-Ping-Interval is not a number of seconds: %q", v))
	}
	if f < 0.1 {
		return defaultKeepalive, nil
	}
	return time.Duration(f * float64(time.Second)), nil
}

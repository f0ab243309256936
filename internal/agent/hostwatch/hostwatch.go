// Package hostwatch notices when other software may have changed files or mounts that
// Wrenn relies on.
package hostwatch

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Watch calls a function after something in its folders, or a mount, changed.
type Watch struct {
	wake   func()
	notify int // an inotify descriptor; negative: none, see ErrExhausted
	mounts int // /proc mountinfo; negative: not watched
	stop   int // an eventfd
	done   sync.WaitGroup
}

// ErrExhausted means that other software uses all of this user's inotify instances, so
// the watch cannot watch folders.
var ErrExhausted = errors.New("no inotify instance is left; raise fs.inotify.max_user_instances")

// inotifyInit is a variable so that a test can replace it.
var inotifyInit = unix.InotifyInit1

// Open starts a watch without folders. The watch calls wake from its own goroutine,
// once for any number of changes. wake must not block, and must find out itself what
// changed. If mounts is set, the watch watches for mounts and unmounts too.
func Open(mounts bool, wake func()) (_ *Watch, err error) {
	w := &Watch{wake: wake, notify: -1, mounts: -1, stop: -1}
	defer func() {
		if err != nil {
			w.close()
			err = fmt.Errorf("watch the host: %w", err)
		}
	}()
	if w.notify, err = inotifyInit(unix.IN_CLOEXEC | unix.IN_NONBLOCK); errors.Is(err, unix.EMFILE) {
		w.notify = -1
	} else if err != nil {
		return nil, err
	}
	if w.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, err
	}
	if mounts {
		// Not os.Open: the kernel reports each change once per descriptor, and Go's poller
		// would consume it before run does.
		if w.mounts, err = unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return nil, err
		}
	}
	w.done.Go(w.run)
	return w, nil
}

// Add watches a folder for files that appear, change or disappear. A folder that was
// removed and made again must be added again. Adding a folder twice does no harm. The
// error may be an [ErrExhausted].
func (w *Watch) Add(dir string) error {
	const what = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ATTRIB | unix.IN_ONLYDIR
	if w.notify < 0 {
		return fmt.Errorf("watch %s: %w", dir, ErrExhausted)
	}
	if _, err := unix.InotifyAddWatch(w.notify, dir, what); err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	return nil
}

// Close ends the watch. After it returns, the watch calls wake no more.
func (w *Watch) Close() error {
	one := [8]byte{1} // not zero, in either byte order
	_, err := unix.Write(w.stop, one[:])
	if err != nil {
		return fmt.Errorf("end watch of the host: %w", err)
	}
	w.done.Wait()
	w.close()
	return nil
}

func (w *Watch) close() {
	for _, fd := range []int{w.notify, w.mounts, w.stop} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (w *Watch) run() {
	events := make([]byte, 64<<10)
	// poll ignores negative descriptors.
	fds := []unix.PollFd{
		{Fd: int32(w.stop), Events: unix.POLLIN}, {Fd: int32(w.notify), Events: unix.POLLIN}, {Fd: int32(w.mounts), Events: unix.POLLPRI},
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return // impossible with these arguments
		}
		if fds[0].Revents != 0 {
			return
		}
		for {
			if n, err := unix.Read(w.notify, events); n <= 0 || err != nil {
				break
			}
		}
		w.wake()
	}
}

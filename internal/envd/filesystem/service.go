// Package filesystem implements the Connect service filesystem.Filesystem, which lists,
// moves, removes and watches files with the rights of the request's user.
package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	pb "github.com/wrenn-dev/wrenn/internal/gen/filesystem"
	"github.com/wrenn-dev/wrenn/internal/gen/filesystem/filesystemconnect"
	"github.com/wrenn-dev/wrenn/internal/nametext"
)

// maxEntries bounds one listing.
const maxEntries = 100_000

// Service is the Connect service.
type Service struct {
	pollers pollers
}

// New returns the service.
func New() *Service { return &Service{pollers: pollers{byID: map[string]*poller{}}} }

// Handler returns the path to mount the service at, and its handler.
func (s *Service) Handler(opts ...connect.HandlerOption) (string, http.Handler) {
	return filesystemconnect.NewFilesystemHandler(s, append(opts, connect.WithReadMaxBytes(1<<20))...)
}

// Close ends the polling watchers.
func (s *Service) Close() { s.pollers.close() }

// on resolves a request's path and calls f with the rights of the request's user.
func on(ctx context.Context, path string, f func(who *account.Account, path string) error) error {
	who, err := account.FromContext(ctx)
	if err != nil {
		return fault.Connect(err)
	}
	path, err = who.Resolve(path)
	if err != nil {
		return fault.Connect(err)
	}
	return fault.Connect(who.Do(func() error { return f(who, path) }))
}

// entryAt is like on, and returns the entry at the path that f returns.
func entryAt(ctx context.Context, path string, f func(who *account.Account, path string) (at string, err error)) (*pb.EntryInfo, error) {
	var e *pb.EntryInfo
	err := on(ctx, path, func(who *account.Account, path string) error {
		at, err := f(who, path)
		if err != nil {
			return err
		}
		e, err = entry(account.LoadNames(), at)
		return err
	})
	return e, err
}

// Stat implements filesystemconnect.FilesystemHandler.
func (s *Service) Stat(ctx context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	e, err := entryAt(ctx, req.Msg.GetPath(), func(_ *account.Account, path string) (string, error) { return path, nil })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StatResponse{Entry: e}), nil
}

// MakeDir implements filesystemconnect.FilesystemHandler.
func (s *Service) MakeDir(ctx context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	e, err := entryAt(ctx, req.Msg.GetPath(), func(_ *account.Account, path string) (string, error) {
		info, err := os.Stat(path)
		if err == nil && info.IsDir() {
			return "", &fs.PathError{Op: "mkdir", Path: path, Err: unix.EEXIST}
		}
		return path, os.MkdirAll(path, 0o755)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), nil
}

// Move implements filesystemconnect.FilesystemHandler.
func (s *Service) Move(ctx context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	e, err := entryAt(ctx, req.Msg.GetSource(), func(who *account.Account, source string) (string, error) {
		destination, err := who.Resolve(req.Msg.GetDestination())
		if err != nil {
			return "", err
		}
		return destination, move(source, destination)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), nil
}

// Remove implements filesystemconnect.FilesystemHandler.
func (s *Service) Remove(ctx context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	err := on(ctx, req.Msg.GetPath(), func(_ *account.Account, path string) error {
		if path == "/" {
			return &fs.PathError{Op: "remove", Path: path, Err: unix.EINVAL}
		}
		if _, err := os.Lstat(path); err != nil {
			return err
		}
		return os.RemoveAll(path)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}

// ListDir implements filesystemconnect.FilesystemHandler. Depth 0 means 1.
func (s *Service) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	res := &pb.ListDirResponse{}
	depth := int(max(req.Msg.GetDepth(), 1))
	err := on(ctx, req.Msg.GetPath(), func(_ *account.Account, root string) error {
		info, err := os.Stat(root)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return &fs.PathError{Op: "list", Path: root, Err: unix.ENOTDIR}
		}
		names := account.LoadNames()
		var list func(dir string, left int) error
		list = func(dir string, left int) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			children, err := os.ReadDir(dir)
			if err != nil {
				return err
			}
			for _, c := range children {
				path := filepath.Join(dir, c.Name())
				e, err := entry(names, path)
				if errors.Is(err, fs.ErrNotExist) {
					continue // removed in the meantime
				}
				if err != nil {
					return err
				}
				if len(res.Entries) >= maxEntries {
					return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d entries below %s", maxEntries, root))
				}
				res.Entries = append(res.Entries, e)
				if c.IsDir() && left > 1 {
					err := list(path, left-1)
					// A folder that this user may not read is listed without its contents.
					if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
						return err
					}
				}
			}
			return nil
		}
		return list(root, depth)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// entry describes the file at path, with the rights of the calling thread. A symbolic
// link has its target's type, size and mode, and the target's path. A dangling one has
// the type of a symbolic link.
func entry(names *account.Names, path string) (*pb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	e := &pb.EntryInfo{Name: info.Name(), Path: path}
	if info.Mode()&fs.ModeSymlink != 0 {
		e.Type = pb.FileType_FILE_TYPE_SYMLINK
		if target, err := filepath.EvalSymlinks(path); err == nil {
			e.SymlinkTarget = new(nametext.Text(target))
		} else if target, err := os.Readlink(path); err == nil {
			e.SymlinkTarget = new(nametext.Text(target))
		}
		if target, err := os.Stat(path); err == nil {
			info = target
		}
	}
	switch {
	case info.IsDir():
		e.Type = pb.FileType_FILE_TYPE_DIRECTORY
	case info.Mode().IsRegular():
		e.Type = pb.FileType_FILE_TYPE_FILE
	}
	e.Name, e.Path = nametext.Text(e.Name), nametext.Text(e.Path)
	e.Size = info.Size()
	e.Mode = uint32(info.Mode().Perm())
	e.Permissions = info.Mode().String()
	e.ModifiedTime = timestamppb.New(info.ModTime())
	if st, ok := info.Sys().(*unixStat); ok {
		e.Owner, e.Group = names.User(st.Uid), names.Group(st.Gid)
	}
	if info.IsDir() || info.Mode().IsRegular() {
		e.Metadata = attributes(path)
	}
	return e, nil
}

// utf8Text replaces bytes that are invalid in protobuf's strings.
func utf8Text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// attributes reads the extended attributes of the user namespace, and drops "user." from
// their names. It leaves out those that it cannot read.
func attributes(path string) map[string]string {
	n, err := unix.Listxattr(path, nil)
	if err != nil || n <= 0 {
		return nil
	}
	list := make([]byte, n)
	if n, err = unix.Listxattr(path, list); err != nil {
		return nil
	}
	var m map[string]string
	for key := range strings.SplitSeq(string(list[:n]), "\x00") {
		name, ok := strings.CutPrefix(key, "user.")
		if !ok {
			continue
		}
		n, err := unix.Getxattr(path, key, nil)
		if err != nil {
			continue
		}
		value := make([]byte, n)
		if n > 0 {
			if n, err = unix.Getxattr(path, key, value); err != nil {
				continue
			}
		}
		if m == nil {
			m = map[string]string{}
		}
		m[utf8Text(name)] = utf8Text(string(value[:n]))
	}
	return m
}

// WatchDir implements filesystemconnect.FilesystemHandler.
func (s *Service) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	every, err := keepalive(req.Header())
	if err != nil {
		return err
	}
	w, err := open(ctx, req.Msg)
	if err != nil {
		return err
	}
	if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}}); err != nil {
		w.Close()
		return err
	}
	events := make(chan *pb.FilesystemEvent)
	ended := make(chan error, 1)
	left := make(chan struct{})
	go func() {
		ended <- w.run(func(e *pb.FilesystemEvent) bool {
			select {
			case events <- e:
				return true
			case <-left:
				return false
			}
		})
	}()
	over := false
	defer func() {
		close(left)
		w.Close()
		if !over {
			<-ended
		}
	}()
	idle := time.NewTicker(every)
	defer idle.Stop()
	for {
		var msg *pb.WatchDirResponse
		select {
		case e := <-events:
			msg = &pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: e}}
			idle.Reset(every)
		case <-idle.C:
			msg = &pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}}
		case err := <-ended:
			over = true
			return fault.Connect(err)
		case <-ctx.Done():
			return fault.Connect(ctx.Err())
		}
		if err := stream.Send(msg); err != nil {
			return err
		}
	}
}

// watchRequest is what WatchDir's and CreateWatcher's requests have in common.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// open starts the watch that a request asks for.
func open(ctx context.Context, req watchRequest) (*watcher, error) {
	var w *watcher
	err := on(ctx, req.GetPath(), func(who *account.Account, path string) error {
		root, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		info, err := os.Stat(root)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return &fs.PathError{Op: "watch", Path: path, Err: unix.ENOTDIR}
		}
		if remote, err := network(root); err != nil {
			return err
		} else if remote && !req.GetAllowNetworkMounts() {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s is on a network mount, where changes by others go unnoticed; set allow_network_mounts to watch it anyway", path))
		}
		w, err = watch(who, root, req.GetRecursive(), req.GetIncludeEntry())
		return err
	})
	return w, err
}

// network reports whether path is on a file system whose files can change without this
// kernel noticing.
func network(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC,
		unix.FUSE_SUPER_MAGIC, unix.V9FS_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}

// CreateWatcher implements filesystemconnect.FilesystemHandler.
func (s *Service) CreateWatcher(ctx context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, err := open(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	id, err := s.pollers.add(w)
	if err != nil {
		w.Close()
		return nil, err
	}
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

// GetWatcherEvents implements filesystemconnect.FilesystemHandler.
func (s *Service) GetWatcherEvents(ctx context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	p, err := s.pollers.get(ctx, req.Msg.GetWatcherId(), false)
	if err != nil {
		return nil, err
	}
	events, err := p.take()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.GetWatcherEventsResponse{Events: events}), nil
}

// RemoveWatcher implements filesystemconnect.FilesystemHandler.
func (s *Service) RemoveWatcher(ctx context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	p, err := s.pollers.get(ctx, req.Msg.GetWatcherId(), true)
	if err != nil {
		return nil, err
	}
	p.stop()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

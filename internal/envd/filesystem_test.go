package envd

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/filesystem"
	process "github.com/wrenn-dev/wrenn/internal/gen/process"
)

func (g *guest) stat(user, path string) (*pb.EntryInfo, error) {
	res, err := g.filesystem.Stat(g.t.Context(), as(user, &pb.StatRequest{Path: path}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetEntry(), nil
}

func TestStat(t *testing.T) {
	g := boot(t)
	path := g.file("f", "text", 0o640)
	if err := os.Chown(path, int(g.nobody.UID), 0); err != nil {
		t.Fatal(err)
	}
	when := time.Unix(1_500_000_000, 123_000_000)
	_ = os.Chtimes(path, when, when)
	_ = unix.Setxattr(path, "user.colour", []byte("blue"), 0)
	_ = unix.Setxattr(path, "trusted.secret", []byte("x"), 0)
	e, err := g.stat("", path)
	if err != nil {
		t.Fatal(err)
	}
	if e.GetName() != "f" || e.GetPath() != path || e.GetType() != pb.FileType_FILE_TYPE_FILE || e.GetSize() != 4 || e.GetMode() != 0o640 ||
		e.GetPermissions() != "-rw-r-----" || e.GetOwner() != "nobody" || e.GetGroup() != "root" || !e.GetModifiedTime().AsTime().Equal(when) || e.SymlinkTarget != nil {
		t.Errorf("the file is %v", e)
	}
	if m := e.GetMetadata(); len(m) > 1 || (len(m) == 1 && m["colour"] != "blue") {
		t.Errorf("its attributes are %v", m)
	} else if len(m) == 0 {
		t.Log("this file system has no user attributes")
	}
	_ = os.Symlink("f", g.dir+"/link")
	_ = os.Symlink(".", g.dir+"/dirlink")
	_ = os.Symlink("none", g.dir+"/dangling")
	for name, want := range map[string]pb.FileType{"link": pb.FileType_FILE_TYPE_FILE, "dirlink": pb.FileType_FILE_TYPE_DIRECTORY, "dangling": pb.FileType_FILE_TYPE_SYMLINK, "": pb.FileType_FILE_TYPE_DIRECTORY} {
		e, err := g.stat("", g.dir+"/"+name)
		if err != nil || e.GetType() != want || (e.SymlinkTarget != nil) != (name != "") {
			t.Errorf("%q is %v, %v", name, e, err)
		}
	}
	if e, err := g.stat("root", "~"); err != nil || e.GetPath() != "/root" {
		t.Errorf("~ is %v, %v", e, err)
	}
	if e, err := g.stat("root", "../etc/./passwd"); err != nil || e.GetPath() != "/etc/passwd" {
		t.Errorf("../etc/passwd is %v, %v", e, err)
	}
	_ = os.Mkdir(g.dir+"/private", 0o700)
	g.file("private/f", "", 0o644)
	for path, want := range map[string]connect.Code{
		g.dir + "/none": connect.CodeNotFound, path + "/x": connect.CodeInvalidArgument, "/\x00": connect.CodeInvalidArgument,
		g.dir + "/private/f": connect.CodePermissionDenied, "/" + strings.Repeat("x", 256): connect.CodeInvalidArgument,
		strings.Repeat("/x", 3000): connect.CodeInvalidArgument,
	} {
		_, err := g.stat("", path)
		wantCode(t, fmt.Sprintf("stat of %.40q", path), err, want)
	}
}

func TestMakeMoveRemove(t *testing.T) {
	g := boot(t)
	ctx := t.Context()
	mkdir := func(path string) error {
		_, err := g.filesystem.MakeDir(ctx, as("", &pb.MakeDirRequest{Path: path}))
		return err
	}
	move := func(from, to string) error {
		_, err := g.filesystem.Move(ctx, as("", &pb.MoveRequest{Source: from, Destination: to}))
		return err
	}
	remove := func(path string) error {
		_, err := g.filesystem.Remove(ctx, as("", &pb.RemoveRequest{Path: path}))
		return err
	}
	if err := mkdir(g.dir + "/a/b/c"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"/a", "/a/b", "/a/b/c"} {
		if uid, gid, mode := owner(t, g.dir+d); uid != g.nobody.UID || gid != g.nobody.GID || mode != 0o755|os.ModeDir {
			t.Errorf("%s is %d:%d %v", d, uid, gid, mode)
		}
	}
	g.file("file", "x", 0o644)
	wantCode(t, "mkdir of what is there", mkdir(g.dir+"/a/b"), connect.CodeAlreadyExists)
	wantCode(t, "mkdir of a file", mkdir(g.dir+"/file"), connect.CodeInvalidArgument)
	wantCode(t, "mkdir below a file", mkdir(g.dir+"/file/x"), connect.CodeInvalidArgument)
	wantCode(t, "mkdir at root's", mkdir("/etc/wrenn"), connect.CodePermissionDenied)
	wantCode(t, "mkdir of a NUL", mkdir("a\x00"), connect.CodeInvalidArgument)

	g.file("a/b/f", "text", 0o644)
	if err := move(g.dir+"/a/b", g.dir+"/x/y/moved"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(g.dir + "/x/y/moved/f"); string(b) != "text" {
		t.Errorf("moved is %q", b)
	}
	wantCode(t, "move of nothing", move(g.dir+"/none", g.dir+"/y"), connect.CodeNotFound)
	wantCode(t, "move into itself", move(g.dir+"/x", g.dir+"/x/y/z"), connect.CodeInvalidArgument)
	wantCode(t, "move over a full folder", move(g.dir+"/a", g.dir+"/x/y"), connect.CodeAlreadyExists)
	wantCode(t, "move of root's", move("/etc/passwd", g.dir+"/p"), connect.CodePermissionDenied)
	wantCode(t, "move to a NUL", move(g.dir+"/x", "\x00"), connect.CodeInvalidArgument)

	// Between file systems.
	disk := g.dir + "/disk"
	_ = os.Mkdir(disk, 0o755)
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m,mode=777"); err != nil {
		t.Log("no tmpfs can be mounted here: ", err)
	} else {
		defer unix.Unmount(disk, unix.MNT_DETACH)
		_ = os.Symlink("f", g.dir+"/x/y/moved/link")
		_ = os.Chmod(g.dir+"/x/y/moved/f", 0o755)
		if err := move(g.dir+"/x/y", disk+"/y"); err != nil {
			t.Fatal(err)
		}
		_, _, mode := owner(t, disk+"/y/moved/f")
		to, _ := os.Readlink(disk + "/y/moved/link")
		if _, err := os.Stat(g.dir + "/x/y"); err == nil || mode != 0o755 || to != "f" {
			t.Errorf("moved to another file system: %v, mode %v, link to %q", err, mode, to)
		}
		if err := os.WriteFile(g.dir+"/big", make([]byte, 4<<20), 0o644); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "move of what does not fit", move(g.dir+"/big", disk+"/big"), connect.CodeResourceExhausted)
		if e, _ := os.ReadDir(disk); len(e) != 1 {
			t.Errorf("these are left: %v", e)
		}
		if _, err := os.Stat(g.dir + "/big"); err != nil {
			t.Error(err)
		}
	}

	_ = os.Mkdir(g.dir+"/full", 0o755)
	_ = os.Chown(g.dir+"/full", int(g.nobody.UID), int(g.nobody.GID))
	g.file("full/f", "x", 0o600)
	_ = os.Symlink("/etc", g.dir+"/full/etc")
	if err := remove(g.dir + "/full"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "remove of nothing", remove(g.dir+"/full"), connect.CodeNotFound)
	wantCode(t, "remove of root's", remove("/etc/passwd"), connect.CodePermissionDenied)
	wantCode(t, "remove of /", remove("/"), connect.CodeInvalidArgument)
}

func TestListDir(t *testing.T) {
	g := boot(t)
	for _, d := range []string{"a", "a/b", "a/b/c"} {
		_ = os.Mkdir(g.dir+"/"+d, 0o755)
	}
	_ = os.Mkdir(g.dir+"/private", 0o700)
	g.file("private/x", "", 0o600)
	g.file("a/f", "1", 0o644)
	g.file("bad\xffname", "odd", 0o644)
	_ = os.Symlink("a", g.dir+"/link")
	list := func(path string, depth uint32) string {
		t.Helper()
		res, err := g.filesystem.ListDir(t.Context(), as("", &pb.ListDirRequest{Path: path, Depth: depth}))
		if err != nil {
			t.Fatal(err)
		}
		var l []string
		for _, e := range res.Msg.GetEntries() {
			l = append(l, strings.TrimPrefix(e.GetPath(), g.dir+"/"))
		}
		slices.Sort(l)
		return strings.Join(l, " ")
	}
	for depth, want := range map[uint32]string{
		0: "a bad\U0010FEFFname link private", 1: "a bad\U0010FEFFname link private", 2: "a a/b a/f bad\U0010FEFFname link private", 9: "a a/b a/b/c a/f bad\U0010FEFFname link private",
	} {
		if got := list(g.dir, depth); got != want {
			t.Errorf("depth %d: %s", depth, got)
		}
	}
	// A name that is not UTF-8 works as it is listed.
	bad := g.dir + "/bad\U0010FEFFname"
	if _, err := g.filesystem.Stat(t.Context(), as("", &pb.StatRequest{Path: bad})); err != nil {
		t.Error(err)
	}
	for _, path := range []string{bad, g.dir + "/bad\xffname"} {
		if a := g.do("GET", "/files"+at(path), testToken, nil, nil); a.code != 200 || a.body != "odd" {
			t.Errorf("%q is read as %d %q", path, a.code, a.body)
		}
	}
	if a := g.do("POST", "/files"+at(g.dir+"/\xfe"), testToken, strings.NewReader("new"), nil); a.code != 200 || !strings.Contains(a.body, "/\U0010FEFE\"") {
		t.Errorf("writing a file whose name is not UTF-8: %d %s", a.code, a.body)
	}
	moved := g.dir + "/moved\U0010FEFE"
	if _, err := g.filesystem.Move(t.Context(), as("", &pb.MoveRequest{Source: g.dir + "/\U0010FEFE", Destination: moved})); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(g.dir + "/moved\xfe"); string(b) != "new" {
		t.Errorf("moved: %q, %v", b, err)
	}
	if _, err := g.filesystem.Remove(t.Context(), as("", &pb.RemoveRequest{Path: moved})); err != nil {
		t.Error(err)
	}
	if got := list(g.dir+"/link", 1); got != "link/b link/f" {
		t.Errorf("through a link: %s", got)
	}
	for path, want := range map[string]connect.Code{g.dir + "/none": connect.CodeNotFound, g.dir + "/a/f": connect.CodeInvalidArgument, g.dir + "/private": connect.CodePermissionDenied} {
		_, err := g.filesystem.ListDir(t.Context(), as("", &pb.ListDirRequest{Path: path}))
		wantCode(t, path, err, want)
	}
}

// watched collects a watch's events as "TYPE name".
type watched struct {
	t      *testing.T
	stream *connect.ServerStreamForClient[pb.WatchDirResponse]
	events chan *pb.FilesystemEvent
}

func (g *guest) watch(req *pb.WatchDirRequest) *watched {
	g.t.Helper()
	s, err := g.filesystem.WatchDir(g.t.Context(), as("", req))
	if err != nil {
		g.t.Fatal(err)
	}
	if !s.Receive() || s.Msg().GetStart() == nil {
		g.t.Fatalf("the first event is %v, %v", s.Msg(), s.Err())
	}
	w := &watched{g.t, s, make(chan *pb.FilesystemEvent, 1000)}
	go func() {
		for s.Receive() {
			if e := s.Msg().GetFilesystem(); e != nil {
				w.events <- e
			}
		}
	}()
	g.t.Cleanup(func() { s.Close() })
	return w
}

func describe(e *pb.FilesystemEvent) string {
	return strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_") + " " + e.GetName()
}

// want waits until the events have arrived in this order, possibly with others between.
func (w *watched) want(events ...string) []*pb.FilesystemEvent {
	w.t.Helper()
	var all []string
	var found []*pb.FilesystemEvent
	limit := time.After(await.Hang)
	for len(found) < len(events) {
		select {
		case e := <-w.events:
			all = append(all, describe(e))
			if describe(e) == events[len(found)] {
				found = append(found, e)
			}
		case <-limit:
			w.t.Fatalf("events are %q, not %q", all, events)
		}
	}
	return found
}

func TestWatchDir(t *testing.T) {
	g := boot(t)
	w := g.watch(&pb.WatchDirRequest{Path: g.dir, IncludeEntry: true})
	path := g.file("f", "x", 0o644)
	e := w.want("CREATE f", "WRITE f")
	if e[1].GetEntry().GetPath() != path {
		t.Errorf("the entry is %v", e[1].GetEntry())
	}
	_ = os.Chmod(path, 0o600)
	w.want("CHMOD f")
	_ = os.Rename(path, g.dir+"/g")
	w.want("RENAME f", "CREATE g")
	_ = os.Remove(g.dir + "/g")
	if e := w.want("REMOVE g"); e[0].Entry != nil {
		t.Errorf("a removed file has the entry %v", e[0].GetEntry())
	}
	// The watch is not recursive: it does not cover folders below.
	_ = os.Mkdir(g.dir+"/d", 0o777)
	g.file("d/below", "", 0o644)
	g.file("last", "", 0o644)
	w.want("CREATE d", "CREATE last")

	// An upload is a write, even to an existing file; nobody sees its temporary name.
	up := g.dir + "/up"
	_ = os.Mkdir(up, 0o777)
	_ = os.Chmod(up, 0o777)
	w = g.watch(&pb.WatchDirRequest{Path: up})
	for range 2 {
		if a := g.do("POST", "/files"+at(up+"/u"), testToken, strings.NewReader("x"), nil); a.code != 200 {
			t.Fatal(a)
		}
	}
	g.file("up/end", "", 0o644)
	var got []string
	for len(got) == 0 || got[len(got)-1] != "CREATE end" {
		got = append(got, describe(await.Recv(t, "an event of uploads", w.events)))
	}
	if want := []string{"CREATE u", "WRITE u", "WRITE u", "CREATE end"}; !slices.Equal(got, want) {
		t.Errorf("events of uploads are %q", got)
	}

	for path, want := range map[string]connect.Code{g.dir + "/none": connect.CodeNotFound, g.dir + "/last": connect.CodeInvalidArgument, "/root": connect.CodePermissionDenied} {
		s, err := g.filesystem.WatchDir(t.Context(), as("", &pb.WatchDirRequest{Path: path}))
		if err == nil {
			s.Receive()
			err = s.Err()
		}
		wantCode(t, path, err, want)
	}
}

func TestWatchDirRecursive(t *testing.T) {
	g := boot(t)
	_ = os.MkdirAll(g.dir+"/a/b", 0o755)
	w := g.watch(&pb.WatchDirRequest{Path: g.dir, Recursive: true})
	g.file("a/b/f", "x", 0o644)
	w.want("CREATE a/b/f", "WRITE a/b/f")
	// Create a tree at once.
	_ = os.MkdirAll(g.dir+"/n/e/w", 0o755)
	w.want("CREATE n", "CREATE n/e", "CREATE n/e/w")
	g.file("n/e/w/f", "", 0o644)
	w.want("CREATE n/e/w/f")
	// A renamed folder stays watched, under its new name.
	_ = os.Rename(g.dir+"/a", g.dir+"/z")
	w.want("RENAME a", "CREATE z")
	await.Until(t, "the renamed folder is watched", func() bool {
		g.file("z/b/probe", "x", 0o644)
		select {
		case e := <-w.events:
			return strings.HasPrefix(e.GetName(), "z/b/")
		default:
			return false
		}
	})
	g.file("z/b/other", "x", 0o644)
	w.want("CREATE z/b/other")
	// A folder moved out is no longer watched.
	out, err := os.MkdirTemp("", "wrenn-out-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(out)
	if err := os.Rename(g.dir+"/z", out+"/z"); err != nil {
		t.Fatal(err)
	}
	w.want("RENAME z")
	// Its watch ends before the next event is sent.
	g.file("next", "", 0o644)
	w.want("CREATE next")
	_ = os.WriteFile(out+"/z/b/unseen", nil, 0o644)
	g.file("seen", "", 0o644)
	for name := ""; name != "seen"; {
		e := await.Recv(t, "the watch continues", w.events)
		if name = e.GetName(); strings.Contains(name, "unseen") {
			t.Errorf("seen outside: %s", describe(e))
		}
	}
	_ = os.RemoveAll(g.dir + "/n")
	w.want("REMOVE n/e/w", "REMOVE n/e", "REMOVE n")
	_ = os.RemoveAll(g.dir)
	w.want("REMOVE .")
}

func TestWatcher(t *testing.T) {
	g := boot(t)
	ctx := t.Context()
	create := func() (string, error) {
		res, err := g.filesystem.CreateWatcher(ctx, as("", &pb.CreateWatcherRequest{Path: g.dir, Recursive: true}))
		if err != nil {
			return "", err
		}
		return res.Msg.GetWatcherId(), nil
	}
	id, err := create()
	if err != nil {
		t.Fatal(err)
	}
	g.file("f", "x", 0o644)
	var got []string
	poll := func(id, user string) error {
		res, err := g.filesystem.GetWatcherEvents(ctx, as(user, &pb.GetWatcherEventsRequest{WatcherId: id}))
		if err != nil {
			return err
		}
		for _, e := range res.Msg.GetEvents() {
			got = append(got, describe(e))
		}
		return nil
	}
	await.Until(t, "events", func() bool {
		if err := poll(id, ""); err != nil {
			t.Fatal(err)
		}
		return slices.Contains(got, "CREATE f") && slices.Contains(got, "WRITE f")
	})
	wantCode(t, "another's watcher", poll(id, "root"), connect.CodeNotFound)
	wantCode(t, "no watcher", poll("x", ""), connect.CodeNotFound)
	// More events than a watcher keeps: it reports the loss once, and continues.
	p := g.start("root", &process.StartRequest{Process: sh("cd " + g.dir + " && for i in $(seq 6000); do : > many; rm many; done")}).wait()
	if p.end.GetExitCode() != 0 {
		t.Fatal(&p.stderr)
	}
	await.Until(t, "the watcher reports the loss", func() bool { return connect.CodeOf(poll(id, "")) == connect.CodeDataLoss })
	if err := poll(id, ""); err != nil {
		t.Error(err)
	}
	if _, err := g.filesystem.RemoveWatcher(ctx, as("", &pb.RemoveWatcherRequest{WatcherId: id})); err != nil {
		t.Fatal(err)
	}
	_, err = g.filesystem.RemoveWatcher(ctx, as("", &pb.RemoveWatcherRequest{WatcherId: id}))
	wantCode(t, "removed watcher", err, connect.CodeNotFound)
	// The number of watchers is bounded.
	n := 0
	for ; n < 200; n++ {
		if _, err = create(); err != nil {
			break
		}
	}
	wantCode(t, "one watcher too many", err, connect.CodeResourceExhausted)
	if n != 128 && n < 50 {
		t.Errorf("%d watchers were created", n)
	}
}

func TestWatchKeepalive(t *testing.T) {
	g := boot(t)
	req := as("", &pb.WatchDirRequest{Path: filepath.Clean(g.dir)})
	req.Header().Set("Keepalive-Ping-Interval", "0.1")
	s, err := g.filesystem.WatchDir(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for n := 0; n < 3; {
		if !s.Receive() {
			t.Fatal(s.Err())
		}
		if s.Msg().GetKeepalive() != nil {
			n++
		}
	}
}

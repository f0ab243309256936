package image

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// captured creates a capture's folder with every file of a capture.
func captured(t testing.TB, dir string) *Capture {
	t.Helper()
	c := &Capture{ID: uuid.New(), Kind: "k", Inputs: "i", VCPUs: 1, MemoryMiB: 128, DiskMiB: 64, Layers: 1, Token: "secret", Dir: dir}
	if err := os.MkdirAll(c.Memory(), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{c.Rootfs(), c.Layer(0), c.Devices(), filepath.Join(c.Memory(), "header")} {
		if err := os.WriteFile(name, []byte("x"), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Write(); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestTemplateOfACaptureIsPublishedWholeAndDeleted(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	tmp, err := TempTemplate(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := captured(t, filepath.Join(tmp, "captures", Captured))
	want := Template{ID: uuid.New(), Team: uuid.New(), Name: "mine", DiskMiB: 64, VCPUs: 1, MemoryMiB: 128}
	if err := PublishTemplate(dir, tmp, want); err != nil {
		t.Fatal(err)
	}
	got, err := Find(dir, want.Team, want.ID)
	if err != nil || got.Name != "mine" || got.VCPUs != 1 || got.MemoryMiB != 128 {
		t.Fatalf("%+v %v", got, err)
	}
	all, err := got.Captures(dir)
	if err != nil || len(all) != 1 || all[0].ID != c.ID || all[0].Token != "secret" {
		t.Fatalf("%+v %v", all, err)
	}
	if st, err := os.Stat(filepath.Join(all[0].Dir, captureFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the record, which holds a token, is %v %v", st.Mode(), err)
	}
	// A hard link keeps the files.
	kept := filepath.Join(t.TempDir(), "origin")
	if err := LinkTree(all[0].Dir, kept); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Delete(dir, want.Team, want.ID, func(string) {}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Find(dir, want.Team, want.ID); err == nil {
		t.Error("a deleted template is still there")
	}
	if left, _ := filepath.Glob(filepath.Join(dir.Images(), "*", "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if o, err := OpenCapture(kept); err != nil || o.ID != c.ID {
		t.Errorf("%+v %v", o, err)
	}
}

// TestDamagedTemplates checks that an unreadable template hides no other, and is set
// aside.
func TestDamagedTemplates(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	publish := func() Template {
		tmp, err := TempTemplate(dir)
		if err != nil {
			t.Fatal(err)
		}
		c := captured(t, filepath.Join(tmp, "captures", Captured))
		h := filepath.Join(c.Memory(), "header")
		if err := errors.Join(os.Remove(h), os.WriteFile(h, []byte("WRNMEMH\x00\x01\x00\x00\x00"), 0o400)); err != nil {
			t.Fatal(err)
		}
		want := Template{ID: uuid.New(), Team: uuid.New(), Name: "mine", DiskMiB: 64}
		if err := PublishTemplate(dir, tmp, want); err != nil {
			t.Fatal(err)
		}
		return want
	}
	write := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good, torn, bare, uncaptured, newer := publish(), publish(), publish(), publish(), publish()
	of := func(t Template) string { return dir.Template(t.Team, t.ID) }
	write(filepath.Join(of(torn), templateFile), `{"name":`)
	if err := os.Remove(filepath.Join(of(bare), rootfsFile)); err != nil {
		t.Fatal(err)
	}
	capture := filepath.Join(dir.Captures(uncaptured.Team, uncaptured.ID), Captured)
	write(filepath.Join(capture, captureFile), "")
	write(filepath.Join(of(newer), templateFile), `{"version": 2, "name": {"new": "shape"}}`)

	all, damaged, err := Load(dir)
	if err != nil || len(all) != 2 || len(damaged) != 3 {
		t.Fatalf("loaded %+v, damaged %+v, %v", all, damaged, err)
	}
	damaged, err = Examine(dir)
	if err != nil || len(damaged) != 4 {
		t.Fatalf("damaged are %+v, %v", damaged, err)
	}
	var later []string
	for _, d := range damaged {
		var n *format.NewerError
		if errors.As(d.Err, &n) {
			later = append(later, n.Path)
		}
	}
	if len(later) != 1 || later[0] != filepath.Join(of(newer), templateFile) {
		t.Errorf("a later release wrote %q", later)
	}
	items, err := SetAside(dir, damaged)
	if err != nil || len(items) != 4 {
		t.Fatalf("set aside %+v, %v", items, err)
	}
	for _, i := range items {
		if _, err := os.Stat(i.Path); err != nil {
			t.Error(err)
		}
		if i.From == capture && i.Kind != unreadable.Capture || i.From != capture && i.Kind != unreadable.Template {
			t.Errorf("set aside %+v", i)
		}
	}
	all, damaged, err = Load(dir)
	if err != nil || len(all) != 2 || len(damaged) != 0 {
		t.Errorf("then loaded %+v, damaged %+v, %v", all, damaged, err)
	}
	if got, err := Find(dir, good.Team, good.ID); err != nil || got.Version != format.Template.Version {
		t.Errorf("the good one is %+v, %v", got, err)
	}
}

// TestUnreadableFolders has unreadable folders of templates and captures. The agent finds
// the others, sets damaged folders aside, and leaves those that it may be able to read
// later.
func TestUnreadableFolders(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	publish := func() Template {
		tmp, err := TempTemplate(dir)
		if err != nil {
			t.Fatal(err)
		}
		want := Template{ID: uuid.New(), Team: uuid.New(), Name: "mine", DiskMiB: 64}
		if err := errors.Join(os.WriteFile(TempRootfs(tmp), nil, 0o600), PublishRootfs(dir, tmp, want)); err != nil {
			t.Fatal(err)
		}
		return want
	}
	bad, loop := publish(), publish()
	publish()
	// A link to itself exists but cannot be read now.
	captures, looping := dir.Captures(bad.Team, bad.ID), dir.Captures(loop.Team, loop.ID)
	team, loopingTeam := filepath.Join(dir.Images(), uuid.NewString()), filepath.Join(dir.Images(), uuid.NewString())
	for path, stays := range map[string]bool{captures: false, team: false, looping: true, loopingTeam: true} {
		err := os.WriteFile(path, nil, 0o600)
		if stays {
			err = errors.Join(os.Remove(path), os.Symlink(path, path))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	all, damaged, err := Load(dir)
	if err != nil || len(all) != 3 || len(damaged) != 2 {
		t.Errorf("loaded %+v, damaged %+v, %v", all, damaged, err)
	}
	damaged, err = Examine(dir)
	if err != nil || len(damaged) != 4 {
		t.Fatalf("damaged are %+v, %v", damaged, err)
	}
	items, _ := SetAside(dir, damaged)
	got := map[string]unreadable.Kind{}
	for _, i := range items {
		got[i.From] = i.Kind
	}
	if !maps.Equal(got, map[string]unreadable.Kind{captures: unreadable.Capture, team: unreadable.Template}) {
		t.Errorf("set aside %v", got)
	}
}

// TestPublishBesideUnreadable checks that a new capture does not move one that cannot be
// read at the moment.
func TestPublishBesideUnreadable(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	tpl := Template{ID: uuid.New(), Team: uuid.New()}
	home := filepath.Join(dir.Captures(tpl.Team, tpl.ID), "name")
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(home, captureFile)
	tmp := filepath.Join(string(dir), "tmp")
	if err := errors.Join(os.Symlink(record, record), os.Mkdir(tmp, 0o700)); err != nil {
		t.Fatal(err)
	}
	if c, err := tpl.Publish(dir, tmp, "name"); err == nil {
		t.Errorf("published %+v", c)
	}
	if _, err := os.Lstat(record); err != nil {
		t.Error(err)
	}
	if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
		t.Errorf("set aside %+v, %v", items, err)
	}
}

// TestTemplateWithoutVersion reads a record of a release that wrote no versions.
func TestTemplateWithoutVersion(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	home := dir.Template(uuid.Nil, uuid.Nil)
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{templateFile: `{"name":"old","disk_mib":64}`, rootfsFile: "x"} {
		if err := os.WriteFile(filepath.Join(home, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Find(dir, uuid.Nil, uuid.Nil); err != nil || got.Name != "old" {
		t.Errorf("read %+v, %v", got, err)
	}
}

func TestLeftovers(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	tmp, err := TempTemplate(dir)
	if err != nil {
		t.Fatal(err)
	}
	captured(t, filepath.Join(tmp, "captures", Captured))
	if all, err := Leftovers(dir); err != nil || !slices.Equal(all, []string{tmp}) {
		t.Errorf("the leftovers are %q, %v", all, err)
	}
}

func FuzzParseCapture(f *testing.F) {
	b, err := os.ReadFile(filepath.Join(captured(f, f.TempDir()).Dir, captureFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseCapture("capture.json", b); err == nil && (c.Layers < 1 || c.MemoryMiB < 1 || c.ID == uuid.Nil) {
			t.Errorf("it accepted %+v", c)
		}
	})
}

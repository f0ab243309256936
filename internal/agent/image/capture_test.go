package image

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

// captured makes a capture's folder with a file for each that it has.
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
	// Who has links keeps the files.
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
		t.Error("a deleted template is there")
	}
	if left, _ := filepath.Glob(filepath.Join(dir.Images(), "*", "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if o, err := OpenCapture(kept); err != nil || o.ID != c.ID {
		t.Errorf("%+v %v", o, err)
	}
}

func TestSweepRemovesWhatWasNotPublished(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	tmp, err := TempTemplate(dir)
	if err != nil {
		t.Fatal(err)
	}
	captured(t, filepath.Join(tmp, "captures", Captured))
	if err := Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(tmp); err == nil {
		t.Error("it is left")
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
		if c, err := parseCapture(b); err == nil && (c.Layers < 1 || c.MemoryMiB < 1 || c.ID == uuid.Nil) {
			t.Errorf("%+v was read", c)
		}
	})
}

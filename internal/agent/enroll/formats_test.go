package enroll

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// enrolled registers a host and returns its credentials as stored.
func enrolled(t *testing.T, p *plane, dir layout.Dir) []byte {
	t.Helper()
	if _, err := Open(t.Context(), p.config(t, string(dir), "good"), Status{}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dir.Enrollment())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCredentialsOfOtherReleases checks that an agent reads credentials without a
// version, and does not touch those of a later release.
func TestCredentialsOfOtherReleases(t *testing.T) {
	p, dir := newPlane(t), layout.Dir(t.TempDir())
	now := enrolled(t, p, dir)
	const line = "  \"version\": 1,\n"
	if !bytes.Contains(now, []byte(line)) {
		t.Fatalf("the credentials have no version: %s", now)
	}
	old := bytes.Replace(now, []byte(line), nil, 1)
	if err := os.WriteFile(dir.Enrollment(), old, 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := Open(t.Context(), p.config(t, string(dir), ""), Status{})
	if err != nil || h.ID() != "hst-1" {
		t.Fatalf("with credentials without a version: %v", err)
	}
	later := bytes.Replace(now, []byte(line), []byte("  \"version\": 2,\n"), 1)
	if err := os.WriteFile(dir.Enrollment(), later, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"", "good"} {
		_, err := Open(t.Context(), p.config(t, string(dir), token), Status{})
		var newer *format.NewerError
		if !errors.As(err, &newer) || newer.Version != 2 || newer.Path != dir.Enrollment() {
			t.Errorf("the error is %v", err)
		}
	}
	if b, err := os.ReadFile(dir.Enrollment()); err != nil || !bytes.Equal(b, later) {
		t.Errorf("the credentials have changed: %v", err)
	}
	if p.registered != 1 {
		t.Errorf("registered %d times", p.registered)
	}
}

// TestUnreadableCredentials checks that an agent keeps unreadable credentials, and
// registers again if it has a token.
func TestUnreadableCredentials(t *testing.T) {
	p, dir := newPlane(t), layout.Dir(t.TempDir())
	torn := enrolled(t, p, dir)[:20]
	if err := os.WriteFile(dir.Enrollment(), torn, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), p.config(t, string(dir), ""), Status{})
	if err == nil || !strings.Contains(err.Error(), dir.Enrollment()) || !strings.Contains(err.Error(), "wrenn host token") {
		t.Errorf("the error is %v", err)
	}
	if b, err := os.ReadFile(dir.Enrollment()); err != nil || !bytes.Equal(b, torn) {
		t.Errorf("the credentials have changed: %v", err)
	}
	p.registered = 0 // somebody created another token
	h, err := Open(t.Context(), p.config(t, string(dir), "good"), Status{})
	if err != nil || h.ID() != "hst-1" {
		t.Fatalf("with a token: %v", err)
	}
	items, err := unreadable.List(dir)
	if err != nil || len(items) != 1 || items[0].Kind != unreadable.Credentials {
		t.Fatalf("set aside %+v, %v", items, err)
	}
	if b, err := os.ReadFile(items[0].Path); err != nil || !bytes.Equal(b, torn) {
		t.Errorf("the file set aside differs: %v", err)
	}
}

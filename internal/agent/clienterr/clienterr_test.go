package clienterr

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"connectrpc.com/connect"
)

// TestShown checks that a text reaches clients only where it was written for them.
func TestShown(t *testing.T) {
	secret := &fs.PathError{Op: "open", Path: "/var/lib/secret", Err: fs.ErrPermission}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{secret, "not found"},
		{fmt.Errorf("look: %w", secret), "not found"},
		{New("no sandbox %d", 7), "no sandbox 7"},
		{Because(secret, "the image is broken"), "the image is broken"},
		{fmt.Errorf("import in /var/lib/secret: %w", Because(secret, "the image is broken")), "the image is broken"},
		{errors.Join(secret, New("there")), "there"},
	} {
		err := connect.NewError(connect.CodeNotFound, tt.err)
		err.Meta().Set("X", "y")
		got, hid := Shown(err)
		if got.Message() != tt.want || got.Code() != connect.CodeNotFound || got.Meta().Get("X") != "y" || hid != (tt.err.Error() != tt.want) {
			t.Errorf("%v: %v (hid: %v), want %q", tt.err, got, hid, tt.want)
		}
		if strings.Contains(got.Error(), "secret") {
			t.Errorf("%v: %v", tt.err, got)
		}
	}
	if got, _ := Shown(connect.NewError(connect.CodeInternal, secret)); got.Message() != "the host failed" {
		t.Error(got)
	}
}

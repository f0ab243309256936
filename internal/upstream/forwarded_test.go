package upstream

import (
	"net/http"
	"testing"
)

func TestTLSBefore(t *testing.T) {
	for _, tt := range []struct {
		peer, says string
		want       bool
	}{
		{"127.0.0.1:1", "https", true},
		{"[::1]:1", "https", true},
		{"[::ffff:127.0.0.1]:1", "https", true},
		{"127.0.0.1:1", "http", false},
		{"127.0.0.1:1", "", false},
		{"192.0.2.1:1", "https", false},
		{"[2001:db8::1]:1", "https", false},
		{"@", "https", false},
	} {
		if got := TLSBefore(&http.Request{RemoteAddr: tt.peer, Header: http.Header{ProtoField: {tt.says}}}); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

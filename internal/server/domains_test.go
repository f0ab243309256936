package server

import (
	"log/slog"
	"strings"
	"testing"
)

func TestDomains(t *testing.T) {
	for _, tt := range []struct {
		public, domain, own string
		want, problem       string
	}{
		{"http://localhost:8000", "localhost", "", "localhost", ""},
		{"https://wrenn.example.com", "wrenn.Example.com", "", "wrenn.example.com", ""},
		{"https://wrenn.example.com", "wrenn.example.com", "Sandboxes.Example.net.", "sandboxes.example.net", ""},
		{"http://localhost:8000", "localhost", "sandboxes.localhost", "sandboxes.localhost", ""},
		{"http://192.0.2.1:8000", "localhost", "192-0-2-1.example.net", "192-0-2-1.example.net", ""},
		{"https://a.co.uk", "a.co.uk", "b.co.uk", "b.co.uk", ""},
		{"https://wrenn.example.com", "wrenn.example.com", "wrenn.example.com", "wrenn.example.com", ""},
		{"https://wrenn.example.com", "localhost", "sandboxes.example.com", "sandboxes.example.com", "the service's own site"},
		{"https://wrenn.example.com", "localhost", "example.com", "", "all names below example.com"},
		{"https://Wrenn.example.com:8443", "localhost", "wrenn.example.com", "", "all names below wrenn.example.com"},
		{"https://wrenn.example.com", "localhost", "*.example.net", "", "is not a domain"},
		{"https://wrenn.example.com", "localhost", "example.net:8000", "", "is not a domain"},
		{"https://wrenn.example.com", "localhost", "https://example.net", "", "is not a domain"},
		{"https://wrenn.example.com", "localhost", "a..b", "", "is not a domain"},
	} {
		var said strings.Builder
		c := Config{PublicURL: tt.public, Domain: tt.domain, SandboxDomain: tt.own, Log: slog.New(slog.NewTextHandler(&said, nil))}
		err := c.setDomains()
		if err != nil {
			said.WriteString(err.Error())
		}
		if (err != nil) != (tt.want == "") || err == nil && c.SandboxDomain != tt.want || (said.Len() > 0) != (tt.problem != "") || !strings.Contains(said.String(), tt.problem) {
			t.Errorf("%+v: %q, said %q", tt, c.SandboxDomain, said.String())
		}
	}
}

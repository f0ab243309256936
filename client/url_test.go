package client

import "testing"

func TestURL(t *testing.T) {
	for _, tt := range []struct{ service, sandbox, want string }{
		{"http://localhost:8000", "http://{port}-cl-x.localhost:8000", "http://80-cl-x.localhost:8000/"},
		{"http://localhost:9000", "http://{port}-cl-x.localhost:8000", "http://80-cl-x.localhost:9000/"}, // a tunnel
		{"http://127.0.0.1:9000", "http://{port}-cl-x.localhost:8000", "http://80-cl-x.localhost:9000/"},
		{"https://Wrenn.example.com/api", "https://{port}-cl-x.wrenn.example.com", "https://80-cl-x.wrenn.example.com/"},
		{"https://wrenn.example.com", "https://{port}-cl-x.sandboxes.example.net", "https://80-cl-x.sandboxes.example.net/"},
		{"http://localhost:8000", "http://{port}-cl-x.sandboxes.localhost:8000", "http://80-cl-x.sandboxes.localhost:8000/"},
		{"http://localhost:8080", "https://{port}-cl-x.sandboxes.example.net:8443", "https://80-cl-x.sandboxes.example.net:8443/"},
	} {
		c, err := New(tt.service, "key")
		if err != nil {
			t.Fatal(err)
		}
		if got := c.URL(&Sandbox{URL: tt.sandbox}, 80); got != tt.want {
			t.Errorf("%s of %s: %s, want %s", tt.sandbox, tt.service, got, tt.want)
		}
	}
}

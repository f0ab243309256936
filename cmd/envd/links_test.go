package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestLinks checks that envd links nothing that only a host's programs need, because
// every guest keeps envd in memory.
func TestLinks(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := strings.Fields(string(out))
	if len(linked) < 50 {
		t.Fatalf("envd links %q", linked)
	}
	for _, p := range linked {
		for _, no := range []string{"github.com/wrenn-dev/wrenn/internal/server", "github.com/wrenn-dev/wrenn/internal/agent", "github.com/wrenn-dev/wrenn/internal/tracing", "go.opentelemetry.io/", "google.golang.org/grpc"} {
			if strings.HasPrefix(p+"/", strings.TrimSuffix(no, "/")+"/") {
				t.Errorf("envd links %s", p)
			}
		}
	}
}

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/client"
)

// TestExamples runs each example as its page describes, checks the output, and checks
// that it leaves nothing.
func TestExamples(t *testing.T) {
	i := up(t)
	folders, err := os.ReadDir("../examples")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"go":     "200 OK: hello from a sandbox\n",
		"curl":   "42\n\n",
		"build":  "HELLO FROM A TEMPLATE\n",
		"search": "round 1: 6 by triple\nround 2: 18 by triple, triple\n",
	}
	for _, f := range folders {
		if !f.IsDir() {
			continue
		}
		t.Run(f.Name(), func(t *testing.T) {
			dir := filepath.Join("..", "examples", f.Name())
			cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "run.sh"))
			if _, err := os.Stat(filepath.Join(dir, "main.go")); err == nil {
				cmd = exec.CommandContext(t.Context(), "go", "run", "./"+dir)
			} else if _, err := exec.LookPath("jq"); err != nil && f.Name() == "curl" {
				t.Skip("needs jq")
			}
			cmd.Env = append(os.Environ(), "WRENN_URL="+i.creds.URL, "WRENN_API_KEY="+i.creds.APIKey, "PATH="+filepath.Dir(i.wrenn)+":"+os.Getenv("PATH"))
			cmd.Stderr = t.Output()
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			if string(out) != want[f.Name()] {
				t.Errorf("it printed %q, want %q", out, want[f.Name()])
			}
			for s, err := range i.client(t).List(t.Context(), client.ListOptions{Metadata: map[string]string{"example": f.Name()}}) {
				if err != nil {
					t.Fatal(err)
				}
				t.Errorf("it left %s, which is %s", s.ID, s.State)
			}
		})
	}
	if _, err := i.client(t).Template(t.Context(), "example"); !client.IsNotFound(err) {
		t.Errorf("the example's template still exists: %v", err)
	}
	page, err := os.ReadFile("../examples/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if !strings.Contains(string(page), "]("+name+"/") {
			t.Errorf("the page of the examples lacks %s", name)
		}
	}
}

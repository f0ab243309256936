package server_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
)

// tools is where `make test-deps` installs the Python packages that
// test/fuzz/requirements.txt locks. clients has the client programs and the Node.js
// packages.
var tools, clients = absolute("../../.cache/python/bin"), absolute("../../test/clients")

func absolute(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		panic(err)
	}
	return abs
}

// needs skips the test if make test-deps has not installed a tool.
func needs(t *testing.T, dir, tool string) string {
	t.Helper()
	path := filepath.Join(dir, tool)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("needs %s: make test-deps", tool)
	}
	return path
}

// TestGeneratedClients generates clients from the OpenAPI document and uses them for
// sandboxes, files, commands, and the upload and build of an archive.
func TestGeneratedClients(t *testing.T) {
	t.Parallel()
	for name, generate := range map[string]func(t *testing.T, dir string, run func(name string, args ...string) string) []string{
		"Python": func(t *testing.T, dir string, run func(string, ...string) string) []string {
			generator, python := needs(t, tools, "openapi-python-client"), needs(t, tools, "python")
			said := run(generator, "generate", "--path", absolute("../../api/openapi.yaml"), "--output-path", filepath.Join(dir, "wrenn"), "--meta", "none",
				"--config", filepath.Join(clients, "python.yaml"), "--fail-on-warning")
			if strings.Contains(said, "WARNING") {
				t.Errorf("the client lacks part of the API:\n%s", said)
			}
			return []string{python, filepath.Join(clients, "client.py")}
		},
		"TypeScript": func(t *testing.T, dir string, run func(string, ...string) string) []string {
			bin := filepath.Join(clients, "node_modules/.bin")
			generator, compiler := needs(t, bin, "openapi-typescript"), needs(t, bin, "tsc")
			for _, file := range []string{"client.ts", "tsconfig.json", "package.json", "node_modules"} {
				if err := os.Symlink(filepath.Join(clients, file), filepath.Join(dir, file)); err != nil {
					t.Fatal(err)
				}
			}
			run(generator, absolute("../../api/openapi.yaml"), "--default-non-nullable", "false", "--output", "schema.d.ts")
			run(compiler, "--preserveSymlinks", "--outDir", "out")
			return []string{"node", "out/client.js"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var environ []string
			run := func(name string, args ...string) string {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), name, args...)
				cmd.Dir = dir
				cmd.Env = append(append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "PYTHONPATH="+dir), environ...)
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%s: %v\n%s", filepath.Base(name), err, out)
				}
				return string(out)
			}
			program := generate(t, dir, run)
			p := newPlane(t)
			archive := filepath.Join(t.TempDir(), "archive.tar")
			if err := pack(t.Context(), archive); err != nil {
				t.Fatal(err)
			}
			environ = []string{"WRENN_URL=" + p.http.URL, "WRENN_API_KEY=" + adminKey, "ARCHIVE=" + archive}
			said := strings.TrimSpace(run(program[0], program[1:]...))
			build, ok := strings.CutPrefix(said, "done ")
			if !ok {
				t.Fatalf("it said %q", said)
			}
			if b := p.ended(build); b["state"] != "succeeded" {
				t.Errorf("its build: %v", b)
			}
			p.agent.mu.Lock()
			defer p.agent.mu.Unlock()
			if got := string(p.agent.files["/srv"]); !strings.Contains(got, "sub/b") {
				t.Errorf("the build copied %q", got)
			}
		})
	}
}

// pack archives a small folder.
func pack(ctx context.Context, to string) (err error) {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "sub/b"), []byte("b"), 0o644); err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = buildcontext.Pack(ctx, f, dir, buildcontext.Limits{})
	return err
}

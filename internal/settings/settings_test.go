package settings

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

type inner struct {
	Every time.Duration `env:"WRENN_EVERY" envDefault:"10s" help:"how often"`
	Most  int           `env:"WRENN_MOST" envDefault:"3" help:"how many"`
}

type config struct {
	URL   string `env:"DATABASE_URL,required,notEmpty" help:"database"`
	On    bool   `env:"WRENN_ON" help:"whether"`
	Inner inner
	Nets  []string `env:"WRENN_NETS" help:"which"`
	Log   *inner   `env:"-"`
}

func testProgram() Program { return Program{Name: "server", Settings: Of(config{})} }

func write(t *testing.T, text string) (environ []string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "wrenn.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{FileVariable + "=" + file}
}

func TestOf(t *testing.T) {
	want := []Setting{
		{Name: "DATABASE_URL", Kind: "text", Required: true, Help: "database"},
		{Name: "WRENN_ON", Kind: "true or false", Help: "whether"},
		{Name: "WRENN_EVERY", Kind: "duration", Default: "10s", Help: "how often"},
		{Name: "WRENN_MOST", Kind: "number", Default: "3", Help: "how many"},
		{Name: "WRENN_NETS", Kind: "list", Help: "which"},
	}
	for _, c := range []any{config{}, &config{}, struct{ config }{}} {
		if got := Of(c); !reflect.DeepEqual(got, want) {
			t.Errorf("%T: %+v", c, got)
		}
	}
}

// TestEnvironmentOverridesFile checks that the environment overrides the file, and the
// file the defaults.
func TestEnvironmentOverridesFile(t *testing.T) {
	environ := write(t, `
server:
  database_url: postgres://file
  on: true
  every: 1m
  nets: [192.0.2.0/24, 198.51.100.7]
  mots: 4
agent:
  most: 5
`)
	values, warnings, err := testProgram().Read(append(environ, "WRENN_EVERY=2m", "WRENN_ON="))
	if err != nil {
		t.Fatal(err)
	}
	file := strings.TrimPrefix(environ[0], FileVariable+"=")
	if want := []string{file + ": server.mots is not a setting: did you mean most?"}; !reflect.DeepEqual(warnings, want) {
		t.Errorf("warnings %q, want %q", warnings, want)
	}
	var c config
	if err := values.Parse(&c); err != nil {
		t.Fatal(err)
	}
	if want := (config{URL: "postgres://file", Inner: inner{2 * time.Minute, 3}, Nets: []string{"192.0.2.0/24", "198.51.100.7"}}); !reflect.DeepEqual(c, want) {
		t.Errorf("read %+v, want %+v", c, want)
	}
}

func TestFileErrors(t *testing.T) {
	for text, want := range map[string]string{
		"server: [":                         "read settings: ",
		"server: 3":                         "read settings: ",
		"server:\n  every:\n    s: 3":       "line 3: server.every: want a value or a list of values",
		"server:\n  nets: [[a, b], c]":      "line 2: server.nets: want a list of values",
		"server:\n  most: 1\n  most: 2":     "read settings: ",
		"server:\n  every: &a [*a]":         "read settings: ",
		"server:\n  database_url: !!map {}": "line 2: server.database_url: want a value",
	} {
		if _, _, err := testProgram().Read(write(t, text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, _, err := testProgram().Read([]string{FileVariable + "=/nowhere/wrenn.yaml"}); err == nil {
		t.Error("a missing file that was named explicitly is no error")
	}
	values, _, err := testProgram().Read(write(t, "server:\n  database_url: x\n  most: many\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := values.Parse(&config{}); err == nil || !strings.Contains(err.Error(), "Most") {
		t.Errorf("an invalid number: %v", err)
	}
}

func TestDefault(t *testing.T) {
	c := inner{Most: 7}
	if Default(&c); c != (inner{10 * time.Second, 7}) {
		t.Errorf("%+v", c)
	}
}

func TestMisspelled(t *testing.T) {
	client := Program{Name: "client", Settings: []Setting{{Name: "WRENN_URL"}, {Name: "WRENN_DIR"}}}
	got := client.Misspelled([]string{"WRENN_ULR=x", "WRENN_ID=x", "WRENN_URL=x", "WRENN_SLOW=1", "WRENN_MOST=1", "PATH=/bin"}, testProgram())
	if want := []string{"WRENN_ULR is not a setting: did you mean WRENN_URL?"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestUnknownSections(t *testing.T) {
	environ := write(t, "sever:\n  every: 1m\nserver:\nagent:\n  most: 1\nother:\n")
	file := strings.TrimPrefix(environ[0], FileVariable+"=")
	got := UnknownSections(environ, testProgram(), Program{Name: "agent"})
	want := []string{file + ": other is not a section", file + ": sever is not a section: did you mean server?"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := UnknownSections(write(t, "server: ["), testProgram()); got != nil {
		t.Errorf("of a file with an error: %q", got)
	}
}

func TestUnknown(t *testing.T) {
	got := Unknown([]string{"WRENN_MOST=1", "WRENN_EVRY=2", "WRENN_SOMETHING_ELSE=3", "PATH=/bin", "DATABASE_URLS=x"}, testProgram())
	want := []string{"WRENN_EVRY is not a setting: did you mean WRENN_EVERY?", "WRENN_SOMETHING_ELSE is not a setting"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

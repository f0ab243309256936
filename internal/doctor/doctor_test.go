package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
)

func TestExamineThisMachine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	in := imagetest.Prepare(t)
	t.Setenv("WRENN_ENVD", in.Envd)
	for _, f := range Examine(t.Context(), in.Dir, false) {
		t.Logf("%+v", f)
		if f.Required && !f.OK {
			t.Errorf("%s: %s", f.Name, f.Detail) // the tests' set-up installs all of it
		}
		if !f.OK && f.Fix == "" {
			t.Errorf("%s has no fix", f.Name)
		}
	}
}

func TestReport(t *testing.T) {
	findings := []Finding{
		{Name: "a", OK: true, Required: true, Detail: "there"},
		{Name: "b", Required: true, Detail: "gone", Fix: "get b", Package: "b-server"},
		{Name: "c", Detail: "gone", Fix: "get c"},
	}
	var table, js bytes.Buffer
	if err := errors.Join(report(&table, "table", findings), report(&js, "json", findings)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ok       a", "MISSING  b", "fix: get b", "note     c", "--no-install-recommends b-server\n"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in\n%s", want, table.String())
		}
	}
	var back []Finding
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || len(back) != 3 || back[1] != findings[1] {
		t.Errorf("got %v, %v", back, err)
	}
}

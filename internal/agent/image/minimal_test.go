package image

import (
	"os/exec"
	"slices"
	"testing"

	"github.com/wrenn-dev/wrenn/templates"
)

func TestPlanOf(t *testing.T) {
	p, err := planOf("FROM debian\nRUN " + install + "a \\\n b\nRUN " + install + "c\nRUN echo 'it''s' \\\n && true\nRUN d\n")
	if err != nil || !slices.Equal(p.packages, []string{"a", "b", "c"}) || len(p.hooks) != 2 || p.hooks[1] != `chroot "$1" /bin/sh -c 'd'` {
		t.Errorf("%q, %v", p, err)
	}
	for _, text := range []string{"", "FROM debian\nCOPY a b\n", "FROM debian\nRUN a\nRUN " + install + "b\n"} {
		if p, err := planOf(text); err == nil {
			t.Errorf("of %q: %q", text, p)
		}
	}
	if p, err := planOf(templates.Minimal); err != nil || !slices.Contains(p.packages, "tini") || len(p.hooks) == 0 {
		t.Errorf("of what is shipped: %q, %v", p, err)
	}
	for _, s := range []string{"", "a b", `it's "$HOME" \`, "'"} {
		if out, err := exec.Command("sh", "-c", "printf %s "+quote(s)).Output(); err != nil || string(out) != s {
			t.Errorf("%q is quoted as %q: %q, %v", s, quote(s), out, err)
		}
	}
}

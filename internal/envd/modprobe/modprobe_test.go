package modprobe

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/kmod"
)

func TestParse(t *testing.T) {
	for args, want := range map[string]request{
		"-q -- fs-fuse":             {quiet: true, names: []string{"fs-fuse"}}, // the kernel's
		"-va bridge br_netfilter":   {names: []string{"bridge", "br_netfilter"}},
		"--all --quiet a b":         {quiet: true, names: []string{"a", "b"}},
		"nbd max_part=8 nbds_max=4": {names: []string{"nbd"}, parameters: "max_part=8 nbds_max=4"},
	} {
		got, err := parse(strings.Fields(args))
		if err != nil || got.quiet != want.quiet || got.parameters != want.parameters || !slices.Equal(got.names, want.names) {
			t.Errorf("%s: %+v, %v", args, got, err)
		}
	}
	for _, args := range []string{"", "-q", "--", "-r nbd", "--remove nbd", "-"} {
		if r, err := parse(strings.Fields(args)); err == nil && args != "-" {
			t.Errorf("%q is %+v", args, r)
		}
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"modules.dep":     "k/bridge.ko: k/stp.ko k/llc.ko\nk/stp.ko: k/llc.ko\nk/llc.ko:\nk/xt_LOG.ko:\nk/nf_log_syslog.ko:\nk/late.ko:\n",
		"modules.builtin": "k/ext4.ko\n",
		"modules.alias":   "alias rtnl-link-bridge bridge\n",
		"modules.softdep": "softdep xt_LOG pre: nf_log_syslog missing post: late\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	broken := map[string]bool{}
	for _, c := range []struct{ names, parameters, broken, want, err string }{
		{names: "rtnl-link-bridge", want: "llc stp bridge"},
		{names: "bridge", parameters: "x=1", want: "llc stp bridge[x=1]"},
		{names: "ext4"},
		{names: "xt-LOG", want: "nf_log_syslog xt_LOG late"},
		{names: "xt_LOG", broken: "nf_log_syslog", want: "xt_LOG late"},
		{names: "nothing", err: "not found"},
		{names: "nothing llc", want: "llc", err: "not found"},
		{names: "bridge", broken: "stp", want: "llc", err: "insert stp"},
	} {
		clear(broken)
		broken[c.broken] = true
		var loaded []string
		err := probe(dir, request{names: strings.Fields(c.names), parameters: c.parameters}, func(file, parameters string) error {
			if broken[kmod.Name(file)] {
				return unix.EPERM
			}
			if parameters != "" {
				parameters = "[" + parameters + "]"
			}
			loaded = append(loaded, kmod.Name(file)+parameters)
			return nil
		})
		if got := strings.Join(loaded, " "); got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%+v: loaded %q, %v", c, got, err)
		}
		if c.err == "not found" && !errors.Is(err, kmod.ErrNotFound) {
			t.Errorf("%s: %v", c.names, err)
		}
	}
	if err := probe(t.TempDir(), request{names: []string{"a"}}, nil); err == nil {
		t.Error("it found a module of a kernel without modules")
	}
}

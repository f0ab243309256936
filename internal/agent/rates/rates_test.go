package rates

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe"
)

func TestTemplates(t *testing.T) {
	a, b := uuid.New(), uuid.New()
	var all Templates
	text := id.Format(id.Template, a) + ":disk_ops=5,net_bytes=0\n " + id.Format(id.Template, b) + ":disk_bytes=7,net_packets=8"
	if err := all.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	host := Rates{DiskBytes: 1, DiskOps: 2, NetBytes: 3, NetPackets: 4, Burst: time.Second}
	for _, c := range []struct {
		template uuid.UUID
		want     Rates
	}{
		{a, Rates{DiskBytes: 1, DiskOps: 5, NetBytes: 0, NetPackets: 4, Burst: time.Second}},
		{b, Rates{DiskBytes: 7, DiskOps: 2, NetBytes: 3, NetPackets: 8, Burst: time.Second}},
		{uuid.New(), host},
	} {
		if got := all.Of(c.template, host); got != c.want {
			t.Errorf("%v has %+v, not %+v", c.template, got, c.want)
		}
	}
	name := id.Format(id.Template, a)
	for _, bad := range []string{
		name, name + ":", name + ":disk_ops", name + ":disk_ops=-1", name + ":disk_ops=x", name + ":speed=1",
		name + ":disk_ops=1,disk_ops=2", name + ":disk_ops=1 " + name + ":disk_ops=2", "minimal:disk_ops=1", ":disk_ops=1",
	} {
		if err := all.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if len(all) != 2 {
		t.Errorf("an invalid value has changed the rates to %v", all)
	}
}

// TestLimits: a template's limits make a host's rates smaller, and never larger.
func TestLimits(t *testing.T) {
	host := Rates{DiskBytes: 100, DiskOps: 0, NetBytes: 300, NetPackets: 400, Burst: time.Second}
	for _, c := range []struct {
		limits Limits
		want   Rates
	}{
		{nil, host},
		{Limits{"disk_bytes": 101, "net_bytes": 300}, host},
		{Limits{"disk_bytes": 99, "disk_ops": Most}, Rates{DiskBytes: 99, DiskOps: Most, NetBytes: 300, NetPackets: 400, Burst: time.Second}},
		{Limits{"net_bytes": 1, "net_packets": 399}, Rates{DiskBytes: 100, NetBytes: 1, NetPackets: 399, Burst: time.Second}},
	} {
		if err := c.limits.Check(); err != nil {
			t.Errorf("%v: %v", c.limits, err)
		}
		if got := c.limits.Within(host); got != c.want {
			t.Errorf("%v within %+v is %+v", c.limits, host, got)
		}
	}
	for _, bad := range []Limits{{"speed": 1}, {"disk_ops": 0}, {"disk_ops": -1}, {"net_bytes": Most + 1}} {
		if bad.Check() == nil {
			t.Errorf("%v is accepted", bad)
		}
	}
}

// TestLimitsOfRecipes: recipes know the same limits.
func TestLimitsOfRecipes(t *testing.T) {
	if got, want := slices.Sorted(maps.Keys(members)), slices.Sorted(maps.Keys(recipe.MinLimits)); !slices.Equal(got, want) {
		t.Errorf("recipes know %v, agents %v", want, got)
	}
	if recipe.MaxLimit != Most {
		t.Errorf("recipes allow %d, agents %d", int64(recipe.MaxLimit), int64(Most))
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		rates Rates
		want  string
	}{
		{Rates{}, ""},
		{Rates{DiskOps: 1, Burst: 10 * time.Millisecond}, ""},
		{Rates{DiskOps: -1, Burst: time.Second}, "negative"},
		{Rates{DiskBytes: Most, Burst: time.Minute}, ""},
		{Rates{DiskBytes: Most + 1, Burst: time.Minute}, "0 means no limit"},
		{Rates{NetBytes: 1 << 62, Burst: time.Second}, "0 means no limit"},
		{Rates{NetBytes: 1}, "burst"},
		{Rates{NetBytes: 1, Burst: time.Hour}, "burst"},
	} {
		err := c.rates.Check()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, not %q", c.rates, err, c.want)
		}
	}
	r := Rates{Burst: 50 * time.Millisecond}
	if got := r.AtOnce(1000); got != 50 {
		t.Errorf("%d at once, not 50", got)
	}
	if got := r.AtOnce(1); got != 1 {
		t.Errorf("%d at once, not 1", got)
	}
}

// Package rates has the limits per second of one guest's use of the host's disk and
// network, which keep a guest from taking all of either.
package rates

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
)

// Rates are the limits of one guest. Zero is no limit.
type Rates struct {
	DiskBytes  int64 `env:"WRENN_DISK_BYTES_PER_SECOND" envDefault:"268435456" help:"bytes that a guest may read and write on its disk in a second; 0: no limit"`
	DiskOps    int64 `env:"WRENN_DISK_OPS_PER_SECOND" envDefault:"3000" help:"reads and writes that a guest may do on its disk in a second; 0: no limit"`
	NetBytes   int64 `env:"WRENN_NET_BYTES_PER_SECOND" envDefault:"134217728" help:"bytes that a guest may send in a second, and as many that it may receive; 0: no limit"`
	NetPackets int64 `env:"WRENN_NET_PACKETS_PER_SECOND" envDefault:"50000" help:"packets that a guest may send in a second, and as many that it may receive; 0: no limit"`
	// For NetBytes, a Burst below a second counts as a second.
	Burst time.Duration `env:"WRENN_BURST" envDefault:"1s" help:"time whose share of its disk and network limits an idle guest may use at once"`
}

// Most is the largest rate. The kernel and QEMU refuse some larger ones.
const Most = 10_000_000_000

// The bounds of a Burst.
const (
	minBurst = 10 * time.Millisecond
	maxBurst = time.Minute
)

// Check returns an error if the rates make no sense.
func (r Rates) Check() error {
	for _, n := range []int64{r.DiskBytes, r.DiskOps, r.NetBytes, r.NetPackets} {
		if n < 0 {
			return errors.New("rate is negative")
		}
		if n > Most {
			return fmt.Errorf("rate %d exceeds %d (0 means no limit)", n, int64(Most))
		}
	}
	if r.DiskBytes|r.DiskOps|r.NetBytes|r.NetPackets != 0 && (r.Burst < minBurst || r.Burst > maxBurst) {
		return fmt.Errorf("burst %v is not between %v and %v", r.Burst, minBurst, maxBurst)
	}
	return nil
}

// AtOnce returns the amount that a rate allows at once after idle time: its share in
// Burst, and at least 1.
func (r Rates) AtOnce(rate int64) int64 {
	return max(1, int64(float64(rate)*r.Burst.Seconds()))
}

// Templates has rates that differ from the host's, by template and by name of the rate.
type Templates map[uuid.UUID]map[string]int64

// members maps the names of rates in [Templates] and [Limits] to their fields.
var members = map[string]func(*Rates) *int64{
	"disk_bytes":  func(r *Rates) *int64 { return &r.DiskBytes },
	"disk_ops":    func(r *Rates) *int64 { return &r.DiskOps },
	"net_bytes":   func(r *Rates) *int64 { return &r.NetBytes },
	"net_packets": func(r *Rates) *int64 { return &r.NetPackets },
}

// UnmarshalText reads templates that are separated by spaces, each with its id and
// its rates: "tpl-…:disk_ops=100,net_bytes=0 tpl-…:disk_bytes=1048576".
func (t *Templates) UnmarshalText(text []byte) error {
	all := Templates{}
	for word := range strings.FieldsSeq(string(text)) {
		name, list, ok := strings.Cut(word, ":")
		template, err := id.Parse(id.Template, name)
		if err != nil || !ok {
			return fmt.Errorf("%q is not a template id, a colon and rates", word)
		}
		if all[template] != nil {
			return fmt.Errorf("%s occurs twice", name)
		}
		own := map[string]int64{}
		for pair := range strings.SplitSeq(list, ",") {
			member, number, _ := strings.Cut(pair, "=")
			n, err := strconv.ParseInt(number, 10, 64)
			if _, twice := own[member]; err != nil || n < 0 || members[member] == nil || twice {
				return fmt.Errorf("%q of %s is not a rate such as disk_ops=100", pair, name)
			}
			own[member] = n
		}
		all[template] = own
	}
	*t = all
	return nil
}

// Of returns the rates for a template's sandboxes on a host whose rates are r.
func (t Templates) Of(template uuid.UUID, r Rates) Rates {
	for member, n := range t[template] {
		*members[member](&r) = n
	}
	return r
}

// Limits are rates that a template defines for its sandboxes, by name of the rate. They
// can only lower what the host allows.
type Limits map[string]int64

// Check returns an error if a name is unknown or a value out of range.
func (l Limits) Check() error {
	for name, n := range l {
		if members[name] == nil || n < 1 || n > Most {
			return fmt.Errorf("%.40q is not a limit, or %d is not between 1 and %d", name, n, int64(Most))
		}
	}
	return nil
}

// Within returns r, which the host allows a sandbox, lowered to the limits.
func (l Limits) Within(r Rates) Rates {
	for name, n := range l {
		member := members[name]
		if member == nil {
			continue // a later release defined it
		}
		if rate := member(&r); *rate == 0 || n < *rate {
			*rate = n
		}
	}
	return r
}

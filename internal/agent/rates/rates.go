// Package rates says what one guest may take of its host's disk and network each
// second, so that no guest takes all of either.
package rates

import (
	"errors"
	"fmt"
	"time"
)

// Rates are limits of one guest. A zero limits nothing.
type Rates struct {
	// DiskBytes and DiskOps are what the guest reads and writes of its disk
	// together, each second.
	DiskBytes int64 `env:"WRENN_DISK_BYTES_PER_SECOND" envDefault:"268435456"`
	DiskOps   int64 `env:"WRENN_DISK_OPS_PER_SECOND" envDefault:"5000"`
	// NetBytes and NetPackets are what the guest sends, and again what it receives,
	// each second.
	NetBytes   int64 `env:"WRENN_NET_BYTES_PER_SECOND" envDefault:"134217728"`
	NetPackets int64 `env:"WRENN_NET_PACKETS_PER_SECOND" envDefault:"50000"`
	// Burst says how much a guest that took nothing before may take at once: what it
	// may take in that time. For bytes of the network it is a second at least.
	Burst time.Duration `env:"WRENN_BURST" envDefault:"1s"`
}

// The bounds of a Burst.
const (
	minBurst = 10 * time.Millisecond
	maxBurst = time.Minute
)

// Check returns an error if the rates make no sense.
func (r Rates) Check() error {
	for _, n := range []int64{r.DiskBytes, r.DiskOps, r.NetBytes, r.NetPackets} {
		if n < 0 {
			return errors.New("a rate is negative")
		}
	}
	if r.DiskBytes|r.DiskOps|r.NetBytes|r.NetPackets != 0 && (r.Burst < minBurst || r.Burst > maxBurst) {
		return fmt.Errorf("a burst of %v is not between %v and %v", r.Burst, minBurst, maxBurst)
	}
	return nil
}

// AtOnce returns how much of a rate can be taken at once: what it allows in Burst,
// and at least one.
func (r Rates) AtOnce(rate int64) int64 {
	return max(1, int64(float64(rate)*r.Burst.Seconds()))
}

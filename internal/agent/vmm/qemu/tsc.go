package qemu

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// tscSpan is how long the counter is measured for. Reading clock and counter
// together is exact to well under a microsecond, so this gives 20 ppm.
const tscSpan = 50 * time.Millisecond

// tscKHz measures the rate of the host's time stamp counter, which is that of
// an emulated guest's.
//
// The guest cannot find it out by itself when the host is busy: it compares
// with a timer that an emulated machine cannot keep in time, gives up, and
// then waits for ever for that timer's interrupts, which a microVM does not
// deliver.
func tscKHz() (int, error) {
	clock0, tsc0, err := clockAndTSC()
	if err != nil {
		return 0, err
	}
	time.Sleep(tscSpan)
	clock1, tsc1, err := clockAndTSC()
	if err != nil {
		return 0, err
	}
	khz := float64(tsc1-tsc0) * 1e6 / float64(clock1-clock0)
	if khz < 100_000 || khz > 10_000_000 {
		return 0, fmt.Errorf("measure time stamp counter: %.0f kHz cannot be", khz)
	}
	return int(math.Round(khz)), nil
}

// clockAndTSC reads the clock, in nanoseconds, and the counter at the same
// time: of several tries the one in which least time passed.
func clockAndTSC() (clock int64, tsc uint64, err error) {
	best := int64(math.MaxInt64)
	for range 32 {
		var before, after unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &before); err != nil {
			return 0, 0, fmt.Errorf("read clock: %w", err)
		}
		t := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &after); err != nil {
			return 0, 0, fmt.Errorf("read clock: %w", err)
		}
		if d := after.Nano() - before.Nano(); d < best {
			best, clock, tsc = d, before.Nano()+d/2, t
		}
	}
	return clock, tsc, nil
}

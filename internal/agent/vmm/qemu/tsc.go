package qemu

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// tscSpan is the duration of a measurement. Reading clock and counter together is accurate
// to well under a microsecond, so the result is accurate to 20 ppm.
const tscSpan = 50 * time.Millisecond

// tscKHz measures the rate of the host's time stamp counter, which an emulated guest has
// too.
//
// On a busy host, the guest cannot measure it itself: it compares the counter with a timer
// that is late under emulation, gives up, and then waits forever for that timer's
// interrupts, which a microVM does not deliver.
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
		return 0, fmt.Errorf("measure time stamp counter: %.0f kHz is out of range", khz)
	}
	return int(math.Round(khz)), nil
}

// clockAndTSC reads the clock, in nanoseconds, and the counter at the same time. It returns
// the fastest of several attempts.
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

// Package vmmtest has [Conformance], the tests that each driver must pass, and helpers for
// tests of virtual machines.
package vmmtest

import (
	"os"
	"strconv"
	"testing"
)

// Accelerator returns the accelerator for tests: WRENN_TEST_ACCEL, which is "kvm" or "tcg"
// (emulation, the default, which works everywhere).
func Accelerator() string {
	if accel := os.Getenv("WRENN_TEST_ACCEL"); accel != "" {
		return accel
	}
	return "tcg"
}

// Count returns the number of repetitions for a test: that in the environment variable name
// if it is set, otherwise n.
func Count(t testing.TB, name string, n int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return n
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, which is not a positive number", name, text)
	}
	return n
}

// Package vmmtest has the tests that each driver must pass, [Conformance], and what
// tests of virtual machines share.
package vmmtest

import (
	"os"
	"strconv"
	"testing"
)

// Accelerator is what tests run guests with: WRENN_TEST_ACCEL, "kvm" or "tcg"
// (emulation, the default, which works everywhere).
func Accelerator() string {
	if accel := os.Getenv("WRENN_TEST_ACCEL"); accel != "" {
		return accel
	}
	return "tcg"
}

// Count is how often a test does something: what the environment variable name
// says, else n.
func Count(t testing.TB, name string, n int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return n
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, which is no positive number", name, text)
	}
	return n
}

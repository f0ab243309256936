//go:build !race

package ballast

const race = false

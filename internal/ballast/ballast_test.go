package ballast

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
)

var sink []byte

// collections returns how often the garbage collector runs for 48 MiB of garbage.
func collections() uint32 {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 48 << 10 {
		sink = make([]byte, 1<<10)
	}
	runtime.ReadMemStats(&after)
	return after.NumGC - before.NumGC
}

func resident(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc/self", "statm"))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// TestLoad loads the ballast in its own process, because that cannot be undone, and
// compares it with one without ballast.
func TestLoad(t *testing.T) {
	const child = "WRENN_TEST_BALLAST"
	switch os.Getenv(child) {
	case "":
		for _, kind := range []string{"with", "without"} {
			cmd := exec.Command(os.Args[0], "-test.run=^TestLoad$")
			cmd.Env = append(os.Environ(), child+"="+kind, "GOGC=100")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", kind, err, out)
			}
		}
	case "without":
		if n := collections(); n < 2 {
			t.Errorf("%d collections without ballast", n)
		}
	case "with":
		debug.SetMemoryLimit(1 << 30)
		memory := resident(t)
		Load()
		if took := resident(t) - memory; took > Bytes/2 && !race {
			t.Errorf("the ballast takes %d bytes", took)
		}
		if got := debug.SetMemoryLimit(-1); got != 1<<30+Bytes {
			t.Errorf("the memory limit is %d", got)
		}
		if n := collections(); n > 1 {
			t.Errorf("%d collections with ballast", n)
		}
		if got := raised(math.MaxInt64); got != math.MaxInt64 {
			t.Errorf("without a limit, it became %d", got)
		}
	}
}

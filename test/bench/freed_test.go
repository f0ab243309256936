package bench

import (
	"strconv"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
)

// freedMiB is the memory that a guest takes and frees.
const freedMiB = 200

// TestFreed measures what a sandbox takes of the host's memory, and what a pause writes,
// after its guest has freed memory: with WRENN_FREE_PAGE_REPORTING and without.
func TestFreed(t *testing.T) {
	asked(t)
	var rows [][]string
	for _, reporting := range []bool{false, true} {
		t.Run(strconv.FormatBool(reporting), func(t *testing.T) {
			h := newHost(t, 4096, map[string]string{"WRENN_FREE_PAGE_REPORTING": strconv.FormatBool(reporting)})
			sandbox := h.create(t, idleMemory)
			defer func() { h.destroy(t, sandbox) }()
			own := func() int64 { return usage(t, agenttest.QEMU(sandbox)).own }
			h.exec(t, sandbox, "sudo mount -t tmpfs -o size=80%,mode=1777 freed /mnt")
			before := own()
			h.exec(t, sandbox, "head -c "+strconv.Itoa(freedMiB<<20)+" /dev/urandom >/mnt/freed")
			full := own()
			h.exec(t, sandbox, "rm /mnt/freed")
			time.Sleep(idleTime)
			after := own()
			begin := time.Now()
			h.pause(t, sandbox)
			took := time.Since(begin)
			h.awaitPauseFinished(t, sandbox)
			var written int64
			for _, bytes := range h.saved(t, sandbox) {
				written += bytes
			}
			h.resume(t, sandbox)
			// The guest takes the memory again.
			again := time.Now()
			h.exec(t, sandbox, "head -c "+strconv.Itoa(freedMiB<<20)+" /dev/zero >/mnt/again")
			rows = append(rows, []string{map[bool]string{false: "off", true: "on"}[reporting], mib(before), mib(full), mib(after), ms(took), mib(written), ms(time.Since(again))})
		})
	}
	table("A guest of "+strconv.Itoa(idleMemory)+" MiB takes and frees "+strconv.Itoa(freedMiB)+" MiB",
		[]string{"`WRENN_FREE_PAGE_REPORTING`", "the guest's own pages before", "with the memory", "10 s after it was freed", "the next pause", "writes", "taking as much again after the resume"}, rows)
}

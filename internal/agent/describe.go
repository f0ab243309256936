package agent

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Machine describes this machine for an agent with its data in dir. It leaves out what
// only a running agent knows.
func Machine(dir layout.Dir, version string) (*pb.HostResponse, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(string(dir), &fs); err != nil {
		return nil, fmt.Errorf("measure disk: %w", err)
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return nil, fmt.Errorf("measure memory: %w", err)
	}
	return &pb.HostResponse{
		Version: version, Cpus: int32(runtime.NumCPU()), MemoryBytes: int64(uint64(si.Totalram) * uint64(si.Unit)),
		DiskBytes: int64(fs.Blocks) * fs.Bsize, DiskFreeBytes: int64(fs.Bavail) * fs.Bsize,
	}, nil
}

// Describe describes the machine and its use by sandboxes.
func (a *Agent) Describe() (*pb.HostResponse, error) {
	m, err := Machine(a.cfg.Dir, a.cfg.Version)
	if err != nil {
		return nil, err
	}
	m.Vmm, m.Accelerator = a.driver.Name(), a.driver.Accelerator()
	// Free means what can still be promised, not what happens to be unused. For the disk,
	// it excludes the reserve for pauses and running writes.
	reserved, total := a.sandboxes.Memory()
	m.MemoryFreeBytes = int64(max(total-reserved, 0)) << 20
	m.MemoryLimitMib, m.MemoryUsedMib = int64(total), int64(reserved)
	for _, sb := range a.sandboxes.List() {
		m.Sandboxes++
		m.VcpusUsed += int32(sb.VCPUs)
	}
	left, err := a.sandboxes.Room().Left()
	if err != nil {
		return nil, err
	}
	m.DiskFreeBytes = min(m.DiskFreeBytes, left)
	block, slots := a.pool.Share()
	m.NetworkBlock, m.Slots = int32(block), int32(slots)
	if err := a.reportUnreadable(); err != nil {
		return nil, err
	}
	for _, p := range a.problems.All() {
		m.Problems = append(m.Problems, &pb.Problem{Kind: string(p.Kind), Object: p.Object, Message: p.Message, Since: timestamppb.New(p.Since)})
	}
	return m, nil
}

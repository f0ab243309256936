package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/jail"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

const (
	// blockSize is the size of the blocks that Flatten leaves out if they are zero.
	blockSize = 4096

	// Limits of e2fsck and resize2fs: processor time in seconds, address space in bytes.
	maxCPU   = 600
	maxSpace = 2 << 30
)

// Flatten checks the disk's ext4 file system, shrinks it as far as possible, and writes
// it to dst as a raw, sparse image that only the caller's user can read. dst must not
// exist. It is synced when Flatten returns. After an error there is no dst.
//
// A guest made the file system, so e2fsck and resize2fs run in a jail as the user uid,
// who must have no other process and no file. The caller must be root.
func Flatten(ctx context.Context, dst string, c Chain, uid int) error {
	v, err := Open(c)
	if err != nil {
		return fmt.Errorf("flatten disk: %w", err)
	}
	defer v.Close()
	err = create(dst, func(f *os.File) error {
		if err := v.writeTo(ctx, f); err != nil {
			return err
		}
		return lend(f, uid, func(t *tools) error {
			if err := t.fsck(ctx); err != nil {
				return err
			}
			if err := t.run(ctx, programs.Resize2fs, "-M"); err != nil {
				return err
			}
			size, err := fileSystemSize(f)
			if err != nil {
				return err
			}
			if err := f.Truncate(size); err != nil {
				return err
			}
			// Once more, to punch out free blocks, and because resize2fs only expands a
			// file system that was just checked.
			return t.fsck(ctx, "-E", "discard")
		})
	})
	if err != nil {
		return fmt.Errorf("flatten disk: %w", err)
	}
	return nil
}

// Expand grows an ext4 file system that Flatten wrote, or a copy of it, to size bytes.
// uid is as for Flatten. The file is synced when Expand returns. After an error, the
// caller must not use the file.
func Expand(ctx context.Context, path string, size int64, uid int) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("expand disk: %w", err)
		}
	}()
	if err := os.Chmod(path, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if size < info.Size() || size%blockSize != 0 || size > maxSize {
		return fmt.Errorf("cannot grow from %d to %d bytes", info.Size(), size)
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	err = lend(f, uid, func(t *tools) error { return t.run(ctx, programs.Resize2fs) })
	if err != nil {
		return err
	}
	return f.Sync()
}

// writeTo writes the disk to f, which must be empty, with holes for zeros.
func (v *View) writeTo(ctx context.Context, f *os.File) error {
	buf := make([]byte, 1<<20)
	for r, err := range v.Data() {
		if err != nil {
			return err
		}
		for off := r.Start; off < r.End; {
			if err := ctx.Err(); err != nil {
				return err
			}
			part := buf[:min(int64(len(buf)), r.End-off)]
			if _, err := v.ReadAt(part, off); err != nil {
				return err
			}
			if err := writeSparse(f, part, off); err != nil {
				return err
			}
			off += int64(len(part))
		}
	}
	return f.Truncate(v.size)
}

var zeros [blockSize]byte

// writeSparse writes p at off, except blocks of zeros.
func writeSparse(f *os.File, p []byte, off int64) error {
	for len(p) > 0 {
		n := 0 // bytes up to the next block of zeros
		for n < len(p) {
			block := p[n:min(n+blockSize, len(p))]
			if bytes.Equal(block, zeros[:len(block)]) {
				break
			}
			n += len(block)
		}
		if _, err := f.WriteAt(p[:n], off); err != nil {
			return err
		}
		skip := n + min(blockSize, len(p)-n)
		p, off = p[skip:], off+int64(skip)
	}
	return nil
}

// fileSystemSize returns the size in bytes of the ext4 file system in f, from its
// superblock (kernel.org, "ext4 Data Structures and Algorithms", 4.1). It fails if the
// file system does not fit into f.
func fileSystemSize(f *os.File) (int64, error) {
	const (
		magic   = 0xef53
		feature = 0x80 // incompatible feature "64bit"
	)
	var sb [1024]byte
	if _, err := f.ReadAt(sb[:], 1024); err != nil {
		return 0, fmt.Errorf("read superblock: %w", err)
	}
	le := binary.LittleEndian
	if le.Uint16(sb[0x38:]) != magic {
		return 0, errors.New("read superblock: not an ext4 file system")
	}
	blocks, shift := uint64(le.Uint32(sb[0x4:])), le.Uint32(sb[0x18:])
	if le.Uint32(sb[0x60:])&feature != 0 {
		blocks |= uint64(le.Uint32(sb[0x150:])) << 32
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if shift > 6 || blocks == 0 || blocks > uint64(info.Size())>>(10+shift) {
		return 0, fmt.Errorf("read superblock: %d blocks of 2^%d KiB", blocks, shift)
	}
	return int64(blocks) << (10 + shift), nil
}

// tools runs programs on a file, in a jail.
type tools struct {
	file *os.File
	size int64 // bytes; the programs cannot make the file larger
	uid  uint32
	jail *jail.Jail
}

// lend makes uid the owner of f while use runs programs on it. Afterwards, only the
// caller's user can read it, even if use failed.
func lend(f *os.File, uid int, use func(t *tools) error) (err error) {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	j, err := jail.New("/run", "null", "zero", "urandom") // /run: any folder will do
	if err != nil {
		return err
	}
	defer j.Close()
	defer func() {
		err = errors.Join(err, f.Chown(os.Getuid(), os.Getgid()), f.Chmod(0o400))
	}()
	if err := f.Chown(uid, uid); err != nil {
		return err
	}
	return use(&tools{file: f, size: info.Size(), uid: uint32(uid), jail: j})
}

// fsck repairs the file system.
func (t *tools) fsck(ctx context.Context, options ...string) error {
	err := t.run(ctx, programs.E2fsck, append([]string{"-fy"}, options...)...)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode()&^3 == 0 {
		return nil // it corrected errors: e2fsck(8)
	}
	return err
}

// run runs a program of e2fsprogs on the file. None of its processes is left when run
// returns.
func (t *tools) run(ctx context.Context, program programs.Program, args ...string) error {
	var said tail
	cmd := programs.Prlimit.CommandContext(ctx, "--core=0", "--nofile=64", "--nproc=64",
		fmt.Sprintf("--cpu=%d", maxCPU), fmt.Sprintf("--as=%d", maxSpace), "--fsize="+strconv.FormatInt(t.size, 10),
		program.File)
	cmd.Args = append(append(cmd.Args, args...), "/proc/self/fd/3")
	cmd.Env, cmd.Dir = []string{"PATH=/usr/sbin:/usr/bin", "LC_ALL=C"}, "/"
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.ExtraFiles = []*os.File{t.file}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: t.uid, Gid: t.uid},
		Setsid:     true,
		Pdeathsig:  syscall.SIGKILL, // dies with the jail's thread, and so with this process
		// The program is the first process of its pid namespace, so its children die with it.
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
	}
	if err := t.jail.Do(cmd.Start); err != nil {
		return fmt.Errorf("run %s: %w", program.File, err)
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("run %s: %w: output ends with %q", program.File, err, said.b)
	}
	return nil
}

// tail keeps the last 2 KiB written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	const most = 2 << 10
	t.b = append(t.b, p...)
	if len(t.b) > most {
		t.b = append(t.b[:0], t.b[len(t.b)-most:]...)
	}
	return len(p), nil
}

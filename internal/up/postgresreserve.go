package up

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/inplace"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// PostgreSQL stops if it cannot write its write-ahead log, and does not start again until
// it can write a few small files. Guests can fill the disk that it shares with them. So
// space is reserved for it: log segments that it reuses, and a spare file that wrenn up
// removes when the disk is full.

const (
	// logMiB is the size of all log files on the disk, used or not, and segmentMiB the
	// size of one of them.
	logMiB     = 512
	segmentMiB = 16
	// spareMiB is the size of the spare file. It is removed when less than fullMiB is
	// free, and created again when plentyMiB is.
	spareMiB  = 64
	fullMiB   = 16
	plentyMiB = 2 * logMiB
	// lookEvery is how often keepRoom checks the free space.
	lookEvery = time.Second
)

// freeMiB returns the free space of the disk of dir.
func freeMiB(dir string) (int64, error) {
	free, err := room.Of(dir)()
	return free >> 20, err
}

func (p *postgres) spare() string { return filepath.Join(p.dir, "spare") }

// makeRoom removes the spare file if less than lessMiB of the disk is free, and creates
// it again if plentyMiB is.
func (p *postgres) makeRoom(lessMiB int64) (err error) {
	free, err := freeMiB(p.dir)
	if err != nil {
		return err
	}
	if free < lessMiB {
		if err := os.Remove(p.spare()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make room for PostgreSQL: %w", err)
		}
		return nil
	}
	// A smaller file is one whose creation was interrupted.
	if st, err := os.Lstat(p.spare()); err == nil && st.Size() == spareMiB<<20 || free < plentyMiB {
		return nil
	}
	// PostgreSQL's user owns the folder, and must not redirect root's write with a link.
	f, err := os.OpenFile(p.spare(), os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("keep room for PostgreSQL: %w", err)
	}
	if err := errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, spareMiB<<20), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("keep room for PostgreSQL: %w", err), os.Remove(p.spare()))
	}
	return nil
}

// keepRoom removes and creates the spare file as needed, until ctx is done.
func (p *postgres) keepRoom(ctx context.Context, say func(format string, args ...any)) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	failing := false
	for {
		err := p.makeRoom(fullMiB)
		if err != nil && !failing {
			say("warning: %v", err)
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// segments counts the files of the log, including unused ones.
func (p *postgres) segments() (n int, err error) {
	entries, err := os.ReadDir(filepath.Join(p.data(), "pg_wal"))
	for _, e := range entries {
		if len(e.Name()) == 24 && strings.Trim(e.Name(), "0123456789ABCDEF") == "" {
			n++
		}
	}
	return n, err
}

// inPlace returns an error if the file system copies the log's files when PostgreSQL
// overwrites them, because PostgreSQL then stops when the disk is full.
func (p *postgres) inPlace() error {
	if err := inplace.Check(filepath.Join(p.data(), "pg_wal")); err != nil {
		return fmt.Errorf("PostgreSQL will stop if the disk is full (docs/sharing.md): %w", err)
	}
	return nil
}

// reserveLog makes PostgreSQL write as many log files as it keeps. From then on it
// reuses them and needs no more space, because a checkpoint begins when half of them are
// used, and ends long before the others are. On a nearly full disk, reserveLog writes
// nothing.
func (p *postgres) reserveLog(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep room for PostgreSQL: %w", err)
		}
	}()
	conn, err := pgx.Connect(ctx, p.url("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	do := func(statements ...string) error {
		for _, sql := range statements {
			if _, err := conn.Exec(ctx, sql); err != nil {
				return err
			}
		}
		return nil
	}
	// Not on the command line, because such a setting cannot change while PostgreSQL runs.
	bound := func(mib int) error {
		return do("ALTER SYSTEM SET min_wal_size = "+strconv.Itoa(logMiB), "ALTER SYSTEM SET max_wal_size = "+strconv.Itoa(mib), "SELECT pg_reload_conf()")
	}
	free, err := freeMiB(p.dir)
	if err != nil {
		return err
	}
	have, err := p.segments()
	if err != nil {
		return err
	}
	const want = logMiB / segmentMiB
	if have < want && free > int64(want-have)*segmentMiB+spareMiB+fullMiB {
		// No checkpoint must begin before there are enough files.
		if err := bound(4 * logMiB); err != nil {
			return err
		}
		for range want {
			// PostgreSQL does not switch from a file that has no records.
			if err := do("SELECT pg_logical_emit_message(false, 'wrenn', '')", "SELECT pg_switch_wal()"); err != nil {
				return err
			}
		}
		if err := do("CHECKPOINT"); err != nil {
			return err
		}
	}
	return bound(logMiB)
}

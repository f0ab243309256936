// Package store connects to PostgreSQL: connection pools, migrations, and the queries
// that sqlc generates from queries/*.sql.
package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	// connections is the default size of the pool, unless the URL sets pool_max_conns.
	connections = 16
	// vital is the size of the extra pool of [Store.Vital].
	vital = 4
	// idleInTransaction is how long a transaction may be idle before PostgreSQL closes
	// its connection. Our code never waits for others in a transaction.
	idleInTransaction = time.Minute
)

// listenAgain is how long Listen waits before it reconnects.
const listenAgain = 2 * time.Second

// Store is the database. Its methods run single queries; [Store.InTx] runs several in one
// transaction.
type Store struct {
	*db.Queries
	// Vital runs heartbeats and leases on its own connections, so that they are on time
	// even if all other connections are busy.
	Vital *db.Queries
	// Server is this process's id. A trigger stores it with every sandbox that the
	// process puts in transit.
	Server uuid.UUID
	pool   *pgxpool.Pool
	kept   *pgxpool.Pool // Vital's
}

// Open connects to the database at url and migrates its schema. If several servers start
// at once, one migrates and the others wait.
func Open(ctx context.Context, url string) (*Store, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		// Do not wrap err: it may contain the password.
		return nil, errors.New("read DATABASE_URL: not a PostgreSQL URL or connection string")
	}
	if !strings.Contains(url, "pool_max_conns") {
		cfg.MaxConns = connections
	}
	cfg.ConnConfig.ConnectTimeout = 5 * time.Second
	// After a failover, connections to the former primary may still be open.
	if cfg.ConnConfig.ValidateConnect == nil {
		cfg.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	stays := cfg.ConnConfig.OnPgError
	cfg.ConnConfig.OnPgError = func(c *pgconn.PgConn, err *pgconn.PgError) bool {
		return err.Code != readOnly && stays(c, err)
	}
	server := uuid.New()
	cfg.ConnConfig.RuntimeParams["wrenn.server"] = server.String()
	cfg.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = strconv.FormatInt(idleInTransaction.Milliseconds(), 10)
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to database: %w", err)
	}
	if err := migrate(ctx, pool); err != nil {
		pool.Close()
		return nil, fmt.Errorf("migrate database: %w", err)
	}
	few := cfg.Copy()
	few.MaxConns, few.MinConns, few.MinIdleConns = vital, 0, 0
	kept, err := pgxpool.NewWithConfig(ctx, few)
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("connect to database: %w", err)
	}
	return &Store{Queries: db.New(metered{pool}), Vital: db.New(kept), Server: server, pool: pool, kept: kept}, nil
}

func migrate(ctx context.Context, pool *pgxpool.Pool) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	// Servers that start at once wait for each other: they poll every second, for up to 5
	// minutes.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300))
	if err != nil {
		return err
	}
	conn := stdlib.OpenDBFromPool(pool)
	defer conn.Close()
	// Allow gaps: a migration with a lower number can be finished later.
	p, err := goose.NewProvider(goose.DialectPostgres, conn, files, goose.WithSessionLocker(locker), goose.WithAllowOutofOrder(true))
	if err != nil {
		return err
	}
	if err := notNewer(ctx, pool, p.ListSources()); err != nil {
		return err
	}
	_, err = p.Up(ctx)
	return err
}

// NewerError reports that a later release has migrated the schema, so this release cannot
// use it.
type NewerError struct {
	// Version is the schema's latest migration that this release does not know, Known the
	// latest one that it knows.
	Version, Known int64
}

// Error implements error. The message tells the operator what to do.
func (e *NewerError) Error() string {
	return fmt.Sprintf("the database has schema version %d, and this release of Wrenn knows versions up to %d: a later release migrated it; nothing was changed; install that release again, see docs/upgrade.md", e.Version, e.Known)
}

// notNewer returns a [NewerError] if the database has a migration that this release does
// not have. Numbers alone do not tell, because migrations can be applied out of order.
func notNewer(ctx context.Context, pool *pgxpool.Pool, ours []*goose.Source) error {
	known := []int64{0} // goose's own first row
	for _, s := range ours {
		known = append(known, s.Version)
	}
	var there bool
	if err := pool.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", goose.DefaultTablename).Scan(&there); err != nil || !there {
		return err
	}
	var newest *int64
	err := pool.QueryRow(ctx, "SELECT max(version_id) FROM "+goose.DefaultTablename+" WHERE version_id <> ALL ($1)", known).Scan(&newest)
	if err != nil || newest == nil {
		return err
	}
	return &NewerError{Version: *newest, Known: slices.Max(known)}
}

// Close waits until every connection is idle and closes it.
func (s *Store) Close() {
	s.pool.Close()
	s.kept.Close()
}

// Acquired returns how many connections are in use, without those of Vital.
func (s *Store) Acquired() int { return int(s.pool.Stat().AcquiredConns()) }

// Ping fails if the database does not respond.
func (s *Store) Ping(ctx context.Context) error { return s.pool.Ping(ctx) }

// InTx runs f in a transaction and commits it if f returns nil.
func (s *Store) InTx(ctx context.Context, f func(*db.Queries) error) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return f(db.New(metered{tx})) })
}

// Listen calls heard with each message on a NOTIFY channel until ctx is done. The
// channel's name must be an identifier. After each connect it calls heard with an empty
// message, because messages may have been missed. It uses its own connection.
func (s *Store) Listen(ctx context.Context, log *slog.Logger, channel string, heard func(message string)) {
	for ctx.Err() == nil {
		err := s.listen(ctx, channel, heard)
		if ctx.Err() != nil {
			return
		}
		log.Warn("listen for notifications of the database", "channel", channel, "error", err)
		t := time.NewTimer(listenAgain)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// listen is [Store.Listen] until the connection breaks.
func (s *Store) listen(ctx context.Context, channel string, heard func(message string)) error {
	pooled, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	conn := pooled.Hijack()
	defer func() {
		bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(bye)
	}()
	if _, err := conn.Exec(ctx, "LISTEN "+pgx.Identifier{channel}.Sanitize()); err != nil {
		return err
	}
	heard("")
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		heard(n.Payload)
	}
}

// Lease takes or renews the named lease for d and reports whether this server holds it.
// One server at a time does.
func (s *Store) Lease(ctx context.Context, name string, d time.Duration) (bool, error) {
	n, err := s.Vital.TakeLease(ctx, db.TakeLeaseParams{Name: name, Server: s.Server, Secs: d.Seconds()})
	if err != nil {
		return false, fmt.Errorf("take lease %q: %w", name, err)
	}
	return n > 0, nil
}

// ErrNoRows is the error, perhaps wrapped, of a query for one row that finds none.
var ErrNoRows = pgx.ErrNoRows

// readOnly is PostgreSQL's code for a write to a standby.
const readOnly = "25006"

// Unreachable reports whether err means that the database does not respond or is a
// read-only standby, so a retry may succeed later.
func Unreachable(err error) bool {
	var connect *pgconn.ConnectError
	var network *net.OpError
	if errors.As(err, &connect) || errors.As(err, &network) || errors.Is(err, net.ErrClosed) || pgconn.SafeToRetry(err) {
		return true
	}
	var pg *pgconn.PgError
	// 08: connection failures; 53: out of connections; 57P: shutting down, starting up.
	return errors.As(err, &pg) && (strings.HasPrefix(pg.Code, "08") || strings.HasPrefix(pg.Code, "53") || strings.HasPrefix(pg.Code, "57P") || pg.Code == readOnly) ||
		err != nil && strings.Contains(err.Error(), "unexpected EOF")
}

// Persist retries f until it no longer fails with an [Unreachable] error, or ctx is done.
func Persist(ctx context.Context, f func(context.Context) error) error {
	waits := backoff.New(50*time.Millisecond, 2*time.Second)
	for {
		err := f(ctx)
		if !Unreachable(err) || waits.Wait(ctx) != nil {
			return err
		}
	}
}

// Duplicate reports whether err is a violation of a unique constraint.
func Duplicate(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "23505"
}

// OverQuota returns the database's message if it refused a change because of a team's
// quota (see charge_team in the migrations).
func OverQuota(err error) (message string, ok bool) { return raised(err, "WQ001") }

// TeamGone reports whether the database refused a change because its team is being
// deleted or does not exist.
func TeamGone(err error) bool {
	_, ok := raised(err, "WQ002")
	var pg *pgconn.PgError
	return ok || errors.As(err, &pg) && pg.ConstraintName == "sandboxes_team_id_fkey"
}

func raised(err error, code string) (message string, ok bool) {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != code {
		return "", false
	}
	return pg.Message, true
}

// Now returns the time in the precision of the database: UTC, in whole microseconds.
func Now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

// Package store is the way to PostgreSQL: the pool of connections, the
// migrations, and the queries that sqlc made of queries/*.sql.
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
	// connections is how many the pool may hold unless the URL says otherwise
	// with pool_max_conns.
	connections = 16
	// vital is how many more there are for [Store.Vital].
	vital = 4
	// idleInTransaction is when PostgreSQL ends a transaction that does nothing, and
	// its connection: no code of ours waits for anybody else in one.
	idleInTransaction = time.Minute
)

// listenAgain is how long after its connection broke Listen makes another.
const listenAgain = 2 * time.Second

// Store is the database. Its methods are the queries, each run on its own;
// InTx runs several as one.
type Store struct {
	*db.Queries
	// Vital runs heartbeats and leases on connections that nothing else takes: they
	// are in time however busy the others are.
	Vital *db.Queries
	// Server names this process among those that work on the database: every
	// change of a sandbox to a state of transit is marked with it, by a trigger.
	Server uuid.UUID
	pool   *pgxpool.Pool
	kept   *pgxpool.Pool // Vital's
}

// Open connects to the database at url and brings its schema up to date. Of
// several servers that start at once, one migrates and the others wait.
func Open(ctx context.Context, url string) (*Store, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		// The error is not wrapped: it may quote the URL, password and all.
		return nil, errors.New("read DATABASE_URL: not a PostgreSQL URL or connection string")
	}
	if !strings.Contains(url, "pool_max_conns") {
		cfg.MaxConns = connections
	}
	cfg.ConnConfig.ConnectTimeout = 5 * time.Second
	// After a failover, connections to what was the primary may still be there.
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
	return &Store{Queries: db.New(pool), Vital: db.New(kept), Server: server, pool: pool, kept: kept}, nil
}

func migrate(ctx context.Context, pool *pgxpool.Pool) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	// Servers that start at once wait for each other: a second between looks, 5 min in all.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 300))
	if err != nil {
		return err
	}
	conn := stdlib.OpenDBFromPool(pool)
	defer conn.Close()
	// Out of order: numbers are given before migrations are done.
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

// NewerError means that the schema is that of a later release, whose tables
// this release does not know.
type NewerError struct {
	// Version is the latest migration of the schema that this release does not
	// know, Known the latest that it does.
	Version, Known int64
}

// Error says what to do.
func (e *NewerError) Error() string {
	return fmt.Sprintf("the database has schema version %d, and this release of Wrenn knows versions up to %d: a later release migrated it; nothing was changed; install that release again, see docs/upgrade.md", e.Version, e.Known)
}

// notNewer returns a [NewerError] if the database has a migration that is not
// one of ours. A migration can have a lower number than one before it.
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

// Close waits until every connection is free and closes it.
func (s *Store) Close() {
	s.pool.Close()
	s.kept.Close()
}

// Acquired returns how many connections are in use, those of Vital aside.
func (s *Store) Acquired() int { return int(s.pool.Stat().AcquiredConns()) }

// Ping says whether the database answers.
func (s *Store) Ping(ctx context.Context) error { return s.pool.Ping(ctx) }

// InTx runs f in a transaction, which is committed when f returns nil.
func (s *Store) InTx(ctx context.Context, f func(*db.Queries) error) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return f(s.WithTx(tx)) })
}

// Listen calls heard with each message to a channel of NOTIFY, whose name is an
// identifier, until ctx is done; at first, and whenever messages may have been
// missed because the connection broke, with an empty one. It has a connection of
// its own.
func (s *Store) Listen(ctx context.Context, log *slog.Logger, channel string, heard func(message string)) {
	for ctx.Err() == nil {
		err := s.listen(ctx, channel, heard)
		if ctx.Err() != nil {
			return
		}
		log.Warn("listen to the database", "channel", channel, "error", err)
		t := time.NewTimer(listenAgain)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// listen is Listen until the connection breaks.
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

// Lease says whether it is this server's turn at what name stands for: of
// several, one server has it, until d has gone by since it last asked.
func (s *Store) Lease(ctx context.Context, name string, d time.Duration) (bool, error) {
	n, err := s.Vital.TakeLease(ctx, db.TakeLeaseParams{Name: name, Server: s.Server, Secs: d.Seconds()})
	if err != nil {
		return false, fmt.Errorf("take the lease %q: %w", name, err)
	}
	return n > 0, nil
}

// ErrNoRows is what a query for one row returns, wrapped, when there is none.
var ErrNoRows = pgx.ErrNoRows

// readOnly is PostgreSQL's code for a change that a standby refuses.
const readOnly = "25006"

// Unreachable says whether err means that the database does not answer, or does
// not take changes because it is a standby, so that the same may work later.
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

// Persist runs f until the database answers it, or ctx is done.
func Persist(ctx context.Context, f func(context.Context) error) error {
	waits := backoff.New(50*time.Millisecond, 2*time.Second)
	for {
		err := f(ctx)
		if !Unreachable(err) || waits.Wait(ctx) != nil {
			return err
		}
	}
}

// Duplicate says whether err means that a row of that name is there already.
func Duplicate(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == "23505"
}

// OverQuota returns what the database says where it refused a change because
// a team would have more than it may (see charge_team in the migrations).
func OverQuota(err error) (message string, ok bool) { return raised(err, "WQ001") }

// TeamGone says whether the database refused a change because its team is
// being deleted, or has been.
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

// Now returns the time as the database keeps it: UTC, in whole microseconds.
func Now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

package store

import (
	"cmp"
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

type meterKey struct{}

// Metered returns a context whose queries call take with the size in bytes of each row,
// before they decode it. If take fails, the query ends with its error. take must be safe
// for concurrent use.
func Metered(ctx context.Context, take func(bytes int) error) context.Context {
	return context.WithValue(ctx, meterKey{}, take)
}

// metered meters the rows of a connection pool or a transaction, for [Metered].
type metered struct{ db.DBTX }

// Query implements [db.DBTX].
func (m metered) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	rows, err := m.DBTX.Query(ctx, sql, args...)
	if take, ok := ctx.Value(meterKey{}).(func(int) error); ok && err == nil {
		return &meteredRows{Rows: rows, take: take}, nil
	}
	return rows, err
}

// QueryRow implements [db.DBTX].
func (m metered) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if ctx.Value(meterKey{}) == nil {
		return m.DBTX.QueryRow(ctx, sql, args...)
	}
	rows, err := m.Query(ctx, sql, args...)
	return meteredRow{rows, err}
}

type meteredRows struct {
	pgx.Rows
	take func(int) error
	err  error // take's
}

// Next implements [pgx.Rows].
func (r *meteredRows) Next() bool {
	if r.err != nil || !r.Rows.Next() {
		return false
	}
	n := 0
	for _, v := range r.RawValues() {
		n += len(v)
	}
	if r.err = r.take(n); r.err != nil {
		r.Close()
		return false
	}
	return true
}

// Err implements [pgx.Rows].
func (r *meteredRows) Err() error { return cmp.Or(r.err, r.Rows.Err()) }

// meteredRow is the first row of a query.
type meteredRow struct {
	rows pgx.Rows
	err  error
}

// Scan implements [pgx.Row].
func (r meteredRow) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		return cmp.Or(r.rows.Err(), pgx.ErrNoRows)
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}

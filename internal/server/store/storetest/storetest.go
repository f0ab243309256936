// Package storetest gives tests databases with the server's schema.
package storetest

import (
	"context"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// migrated is copied for each test, because all migrations together take long.
var migrated = pgtest.Template{Fill: func(url string) error {
	s, err := store.Open(context.Background(), url)
	if err != nil {
		return err
	}
	s.Close()
	return nil
}}

// New returns the URL of a database with the schema, and without rows. It skips the test
// if PostgreSQL is not installed. The package's TestMain must call [pgtest.Main].
func New(t testing.TB) string {
	t.Helper()
	return migrated.New(t)
}

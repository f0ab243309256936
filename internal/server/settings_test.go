package server

import (
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/settings"
)

// TestDefaultSettings checks that the documented defaults apply to zero fields.
func TestDefaultSettings(t *testing.T) {
	var c Config
	if err := (settings.Values{"DATABASE_URL": "x", "REDIS_URL": "x", "WRENN_SECRET_KEY": "x"}).Parse(&c); err != nil {
		t.Fatal(err)
	}
	if c.RequestMemoryMiB != minRequestMemoryMiB || c.RequestsAtOnce != defaultAtOnce || c.SpoolMiB != spool.DefaultMiB || c.Heartbeat != hosts.DefaultHeartbeat {
		t.Errorf("%+v", c)
	}
}

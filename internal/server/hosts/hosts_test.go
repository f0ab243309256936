package hosts

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// fleet is a registry with its own database.
type fleet struct {
	*testing.T
	*Registry
	sql *pgx.Conn
}

func newFleet(t *testing.T, c Config) *fleet {
	t.Helper()
	ctx := context.Background()
	url := storetest.New(t)
	var err error
	if c.Store, err = store.Open(ctx, url); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Store.Close)
	c.Tokens, c.Log = auth.NewTokens([]byte("secret")), slog.New(slog.DiscardHandler)
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return &fleet{t, r, pgtest.Connect(t, url)}
}

func (f *fleet) exec(sql string, args ...any) {
	f.Helper()
	if _, err := f.sql.Exec(context.Background(), sql, args...); err != nil {
		f.Fatalf("%s: %v", sql, err)
	}
}

// add creates a host and returns its token.
func (f *fleet) add() (uuid.UUID, string) {
	f.Helper()
	row, token, err := f.Add(context.Background(), "a host", nil)
	if err != nil {
		f.Fatal(err)
	}
	return row.ID, token
}

func sum(token string) []byte {
	h := sha256.Sum256([]byte(token))
	return h[:]
}

// refused fails the test unless err is a fault with the code.
func (f *fleet) refused(what string, err error, code fault.Code) {
	f.Helper()
	if !fault.Is(err, code) {
		f.Errorf("%s: %v, want %s", what, err, code)
	}
}

func TestRegistration(t *testing.T) {
	f := newFleet(t, Config{})
	ctx := context.Background()
	host, token := f.add()
	g := Registration{Token: token, URL: "http://127.0.0.1:7070", Refresh: sum("r1"), Specs: Specs{CPUs: 4}}
	c, err := f.Enroll(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	if c.Host != host || c.Certificate != nil || c.AgentToken != f.Tokens.Agent(host, 1) || c.Heartbeat != DefaultHeartbeat {
		t.Errorf("got %+v", c)
	}
	// The first response may have been lost.
	again, err := f.Enroll(ctx, g)
	if err != nil {
		t.Fatalf("the same agent again: %v", err)
	}
	if again.AgentToken == c.AgentToken {
		t.Error("a second registration has the first one's token")
	}
	other := g
	other.Refresh, other.URL = sum("thief"), "http://127.0.0.1:7071"
	_, err = f.Enroll(ctx, other)
	f.refused("another agent with the same token", err, fault.Unauthenticated)
	// Once its credentials were used, the registration is complete.
	if _, err := f.RefreshCredentials(ctx, Renewal{Refresh: "r1", Next: sum("r2")}); err != nil {
		t.Fatal(err)
	}
	_, err = f.Enroll(ctx, g)
	f.refused("the same agent after it used its credentials", err, fault.Unauthenticated)
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: token, Next: sum("x")})
	f.refused("a registration token as refresh token", err, fault.Unauthenticated)

	_, late := f.add()
	f.exec("UPDATE hosts SET registration_expires_at = now() - interval '1 second' WHERE refresh_hash IS NULL")
	g = Registration{Token: late, URL: "http://127.0.0.1:7072", Refresh: sum("q")}
	_, err = f.Enroll(ctx, g)
	f.refused("an expired token", err, fault.Unauthenticated)
	for _, wrong := range []string{"", "wrnh_", "wrnh_" + strings.Repeat("0", 64), strings.TrimPrefix(token, "wrnh_")} {
		g.Token = wrong
		_, err = f.Enroll(ctx, g)
		f.refused("token "+wrong, err, fault.Unauthenticated)
	}
	_, fresh := f.add()
	g = Registration{Token: fresh, URL: "http://127.0.0.1:7070", Refresh: sum("p")}
	_, err = f.Enroll(ctx, g)
	f.refused("another host's URL", err, fault.Conflict)
	for _, url := range []string{
		"", "http://192.0.2.1:7070", "https://127.0.0.1:7070", "http://0.0.0.0:80", "http://127.0.0.1", "http://127.0.0.1:7070/x",
		"http://u:p@127.0.0.1:7070", "ftp://127.0.0.1:70", "http://127.0.0.1:99999", "//127.0.0.1:1", "http://metadata.example:80",
	} {
		g.URL = url
		_, err = f.Enroll(ctx, g)
		f.refused("URL "+url, err, fault.InvalidArgument)
	}
	// No refused registration used up the token.
	g.URL = "http://127.0.0.1:7073"
	if _, err := f.Enroll(ctx, g); err != nil {
		t.Error(err)
	}
	var text string
	if err := f.sql.QueryRow(ctx, "SELECT string_agg(hosts::text, ' ') FROM hosts").Scan(&text); err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{token, fresh, c.AgentToken, c.Token} {
		if strings.Contains(text, secret) {
			t.Error("a secret is in the table")
		}
	}
}

func TestRefresh(t *testing.T) {
	f := newFleet(t, Config{})
	ctx := context.Background()
	host, token := f.add()
	c, err := f.Enroll(ctx, Registration{Token: token, URL: "http://127.0.0.1:7070", Refresh: sum("r1")})
	if err != nil {
		t.Fatal(err)
	}
	beat := func(token string) error { _, err := f.Beat(ctx, token, Specs{}); return err }
	if err := beat(c.Token); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{"", "x", c.Token + "x", c.Token[:len(c.Token)-2] + "AA", "eyJhbGciOiJub25lIn0." + strings.Split(c.Token, ".")[1] + "."} {
		f.refused("token "+wrong, beat(wrong), fault.Unauthenticated)
	}
	for range 2 { // The second call follows a lost response.
		if c, err = f.RefreshCredentials(ctx, Renewal{Refresh: "r1", Next: sum("r2")}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.RefreshCredentials(ctx, Renewal{Refresh: "r2", Next: sum("r3")}); err != nil {
		t.Fatal(err)
	}
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: "r1", Next: sum("r2")})
	f.refused("a token of long ago", err, fault.Unauthenticated)
	if err := beat(c.Token); err != nil {
		t.Errorf("an old token was not taken for theft: %v", err)
	}
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: "r2", Next: sum("thief's")})
	f.refused("a token used twice", err, fault.Unauthenticated)
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: "r3", Next: sum("r4")})
	f.refused("the token after one that was used twice", err, fault.Unauthenticated)
	f.refused("the token of a revoked host", beat(c.Token), fault.Unauthenticated)
	if row, _, err := f.Describe(ctx, host); err != nil || row.Status != "offline" {
		t.Errorf("status %s, %v", row.Status, err)
	}
	// An admin lets it register again.
	_, token, err = f.Renew(ctx, host)
	if err != nil {
		t.Fatal(err)
	}
	back, err := f.Enroll(ctx, Registration{Token: token, URL: "http://127.0.0.1:7070", Refresh: sum("s1")})
	if err != nil || back.Host != host {
		t.Fatalf("%v, %v", back.Host, err)
	}
	f.refused("a token from before the revocation", beat(c.Token), fault.Unauthenticated)
	if err := beat(back.Token); err != nil {
		t.Error(err)
	}
	if err := f.Leave(ctx, back.Token); err != nil {
		t.Error(err)
	}
	if _, err := f.Delete(ctx, host, false); err != nil {
		t.Fatal(err)
	}
	f.refused("a deleted host's heartbeat", beat(back.Token), fault.Unauthenticated)
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: "s1", Next: sum("s2")})
	f.refused("a deleted host's refresh", err, fault.Unauthenticated)
	_, _, err = f.Renew(ctx, host)
	f.refused("a deleted host's registration", err, fault.NotFound)
}

// server is an agent that serves over TLS and only reports its host.
type server struct {
	hostagentv1connect.UnimplementedHostAgentHandler
}

func (server) Host(context.Context, *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	return connect.NewResponse(&hostagentv1.HostResponse{Cpus: 3, MemoryLimitMib: 2048, Problems: []*hostagentv1.Problem{{Kind: "firewall", Message: "closed\x00"}}}), nil
}

// TestCertificates calls a host over real TLS: with its credentials, with revoked ones,
// and after its deletion.
func TestCertificates(t *testing.T) {
	ca, err := pki.NewAuthority()
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, Config{Authority: ca})
	ctx := context.Background()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "https://" + l.Addr().String()
	var identity pki.Listener
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(server{}))
	mux.HandleFunc("/proxy/", func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(r.Proto)) })
	web := netaddr.Server(mux)
	web.TLSConfig = identity.TLS()
	go web.ServeTLS(l, "", "")
	t.Cleanup(func() { web.Close() })

	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	request := func(key crypto.Signer, address string) []byte {
		csr, err := pki.NewRequest(key, address)
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	host, token := f.add()
	g := Registration{Token: token, URL: url, Refresh: sum("r1"), CSR: request(key, "127.0.0.2")}
	_, err = f.Enroll(ctx, g)
	f.refused("a certificate for another address", err, fault.InvalidArgument)
	g.CSR = nil
	_, err = f.Enroll(ctx, g)
	f.refused("no signing request", err, fault.InvalidArgument)
	plain := g
	plain.URL = "http://127.0.0.1:7070"
	_, err = f.Enroll(ctx, plain)
	f.refused("in clear where there is an authority", err, fault.InvalidArgument)
	g.CSR = request(key, "127.0.0.1")
	c, err := f.Enroll(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err := pki.EncodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	use := func(c Credentials) {
		if err := identity.Set(c.Certificate, keyPEM, c.Authority); err != nil {
			t.Fatal(err)
		}
	}
	use(c)
	// contact makes a call over new connections.
	contact := func() error {
		if _, err := f.Refresh(ctx); err != nil {
			t.Fatal(err)
		}
		h, err := f.Get(&host)
		if err != nil {
			return err
		}
		h.client.CloseIdleConnections()
		return f.Contact(ctx, h)
	}
	if err := contact(); err != nil {
		t.Fatal(err)
	}
	row, _, err := f.Describe(ctx, host)
	if err != nil || row.Status != "online" || row.CPUs != 3 || row.CapacityMib != 2048 || len(Problems(row)) != 1 || Problems(row)[0].Message != "closed " {
		t.Errorf("%+v, %v", row, err)
	}
	h, err := f.Get(&host)
	if err != nil {
		t.Fatal(err)
	}
	// carry sends a request the way the proxy does.
	carry := func() (*http.Response, error) {
		resp, err := (&http.Client{Transport: h.Transport()}).Get("http://agent/proxy/x")
		if err == nil {
			resp.Body.Close()
		}
		return resp, err
	}
	if resp, err := carry(); err != nil || resp.StatusCode != 200 || resp.Proto != "HTTP/1.1" {
		t.Errorf("the carried request: %+v, %v", resp, err)
	}

	// After four refreshes, the first leaf is no longer one of the newest.
	first := c
	for i, next := range []string{"r2", "r3", "r4", "r5"} {
		c, err = f.RefreshCredentials(ctx, Renewal{Refresh: []string{"r1", "r2", "r3", "r4"}[i], Next: sum(next), CSR: request(key, "127.0.0.1")})
		if err != nil {
			t.Fatal(err)
		}
	}
	use(c)
	if err := contact(); err != nil {
		t.Fatalf("with the renewed certificate: %v", err)
	}
	use(first)
	h.client.CloseIdleConnections()
	if err := contact(); err == nil {
		t.Error("a certificate that was replaced long ago is accepted")
	}
	use(c)
	if err := contact(); err != nil {
		t.Fatal(err)
	}
	// After a revocation the host is not called, whatever certificate it shows.
	_, err = f.RefreshCredentials(ctx, Renewal{Refresh: "r4", Next: sum("thief's"), CSR: request(key, "127.0.0.1")})
	f.refused("reuse", err, fault.Unauthenticated)
	// This holds at once: old connections are closed, and new ones are refused.
	if err := f.Contact(ctx, h); err == nil {
		t.Error("a revoked host is called over an old connection")
	}
	if _, err := f.Get(&host); !fault.Is(err, fault.HostUnreachable) {
		t.Errorf("a revoked host can be reached: %v", err)
	}
	if _, err := carry(); err == nil {
		t.Error("a request reached a revoked host")
	}
	f.refused("calling a revoked host", contact(), fault.HostUnreachable)
	// After it registers again, the leaf from before the revocation stays invalid.
	_, token, err = f.Renew(ctx, host)
	if err != nil {
		t.Fatal(err)
	}
	g.Token, g.Refresh = token, sum("n1")
	old := c
	if c, err = f.Enroll(ctx, g); err != nil {
		t.Fatal(err)
	}
	use(old)
	if err := contact(); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("with a revoked certificate: %v", err)
	}
	use(c)
	if err := contact(); err != nil {
		t.Error(err)
	}
	if _, err := f.Delete(ctx, host, false); err != nil {
		t.Fatal(err)
	}
	f.refused("calling a deleted host", contact(), fault.HostUnreachable)
}

// sandbox adds a row for a sandbox on a host.
func (f *fleet) sandbox(host uuid.UUID, state string, memory int32) uuid.UUID {
	f.Helper()
	u := uuid.New()
	f.exec(`INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
		VALUES ($1, $2, $3, $2, 'minimal', $4, 1, $5, 5120, 0, '{}', now())`, u, uuid.Nil, host, state, memory)
	return u
}

func TestDelete(t *testing.T) {
	f := newFleet(t, Config{})
	ctx := context.Background()
	host, token := f.add()
	if _, err := f.Enroll(ctx, Registration{Token: token, URL: "http://127.0.0.1:1", Refresh: sum("r1")}); err != nil {
		t.Fatal(err)
	}
	f.sandbox(host, "running", 128)
	f.sandbox(host, "paused", 128)
	over := f.sandbox(host, "stopped", 128)
	f.exec("INSERT INTO teams (id, name) VALUES ($1, 'x')", host)
	f.exec("INSERT INTO templates (id, team_id, name, size_bytes, created_at) VALUES ($1, $1, 'snap', 1, now())", host)
	f.exec("INSERT INTO host_templates VALUES ($1, $1)", host)
	_, load, err := f.Describe(ctx, host)
	if err != nil || load.Sandboxes["running"] != 1 || load.Sandboxes["paused"] != 1 || len(load.Sandboxes) != 2 || load.Templates != 1 {
		t.Errorf("%+v, %v", load, err)
	}
	_, err = f.Delete(ctx, host, false)
	f.refused("deletion without force", err, fault.Conflict)
	lost, err := f.Delete(ctx, host, true)
	if err != nil || len(lost) != 2 {
		t.Fatalf("lost %v, %v", lost, err)
	}
	for _, u := range append(lost, over) {
		row, err := f.Store.GetSandbox(ctx, u)
		if err != nil || row.State != "stopped" || (u != over && *row.EndReason != "lost") {
			t.Errorf("%+v, %v", row, err)
		}
	}
	if row, err := f.Store.GetTemplate(ctx, host); !errors.Is(err, store.ErrNoRows) {
		t.Errorf("a template that no host has: %+v, %v", row, err)
	}
	_, err = f.Delete(ctx, host, true)
	f.refused("deletion again", err, fault.NotFound)
	static, err := f.Register(ctx, "unix:/x", "token")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Delete(ctx, static.ID, true)
	f.refused("deletion of a configured host", err, fault.Conflict)
}

// TestSweep checks which hosts and sandboxes become unreachable, and when.
func TestSweep(t *testing.T) {
	f := newFleet(t, Config{})
	ctx := context.Background()
	tests := []struct {
		name, status, seen, beat string
		enrolled                 bool
		want                     string
	}{
		{"heard and answers", "online", "1 second", "1 second", true, "online"},
		{"silent", "online", "1 second", "30 seconds", true, "unreachable"},
		{"does not answer", "online", "30 seconds", "1 second", true, "unreachable"},
		{"one heartbeat late", "online", "1 second", "15 seconds", true, "online"},
		{"configured and answers", "online", "1 second", "", false, "online"},
		{"configured, does not answer", "online", "30 seconds", "", false, "unreachable"},
		{"never there", "pending", "", "", true, "pending"},
		{"went", "offline", "1 second", "", true, "offline"},
	}
	ids := make([]uuid.UUID, len(tests))
	boxes := make([]uuid.UUID, len(tests))
	for i, tt := range tests {
		ids[i] = uuid.New()
		f.exec(`INSERT INTO hosts (id, url, status, enrolled, last_seen_at, heartbeat_at) VALUES ($1, $2, $3, $4, now() - NULLIF($5, '')::interval, now() - NULLIF($6, '')::interval)`,
			ids[i], "unix:/"+tt.name, tt.status, tt.enrolled, tt.seen, tt.beat)
		boxes[i] = f.sandbox(ids[i], "running", 128)
		f.sandbox(ids[i], "paused", 128)
	}
	missing, err := f.Sweep(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for i, tt := range tests {
		row, err := f.Store.GetHost(ctx, ids[i])
		if err != nil || row.Status != tt.want {
			t.Errorf("%s: %s, want %s (%v)", tt.name, row.Status, tt.want, err)
		}
		state := "running"
		if tt.want == "unreachable" || tt.want == "offline" {
			state = "missing"
			n++
		}
		if sb, err := f.Store.GetSandbox(ctx, boxes[i]); err != nil || sb.State != state {
			t.Errorf("%s: its sandbox is %s, want %s (%v)", tt.name, sb.State, state, err)
		}
	}
	if len(missing) != n {
		t.Errorf("%d missing, want %d", len(missing), n)
	}
}

// TestReserve makes many concurrent reservations on two hosts, like several servers: no
// host is overbooked, and none is left with room that was asked for.
func TestReserve(t *testing.T) {
	f := newFleet(t, Config{Policy: scheduler.Policy{MemoryFactor: 1, VCPUFactor: 8}})
	ctx := context.Background()
	template := uuid.New()
	f.exec("INSERT INTO templates (id, team_id, name, size_bytes, created_at) VALUES ($1, $2, 'other', 1, now())", template, uuid.Nil)
	const each = 6 // sandboxes that fit on a host
	for i := range 3 {
		host, err := f.Register(ctx, "unix:/h"+string(rune('0'+i)), "t")
		if err != nil {
			t.Fatal(err)
		}
		f.exec("UPDATE hosts SET status = 'online', capacity_mib = $2, cpus = 8, draining = $3 WHERE id = $1", host.ID, each*128, i == 2)
		f.exec("INSERT INTO host_templates VALUES ($1, $2)", host.ID, template)
	}
	req := scheduler.Request{MemoryMiB: 128, VCPUs: 1}
	var mu sync.Mutex
	placed, full := 0, 0
	var wg sync.WaitGroup
	for range 3 * each {
		wg.Go(func() {
			{
				places, err := f.Places(ctx, template, req)
				for _, h := range places {
					err = f.Store.InTx(ctx, func(q *db.Queries) error {
						if err := f.Reserve(ctx, q, h.ID, req); err != nil {
							return err
						}
						_, err := q.InsertSandbox(ctx, db.InsertSandboxParams{ID: uuid.New(), TeamID: uuid.Nil, HostID: &h.ID, TemplateID: template, TemplateName: "minimal", VCPUs: 1, MemoryMiB: 128, Metadata: map[string]string{}, CreatedAt: time.Now(), OnTimeout: "destroy"})
						return err
					})
					if err == nil || !fault.Is(err, fault.NoCapacity) {
						break
					}
				}
				mu.Lock()
				switch {
				case err == nil:
					placed++
				case fault.Is(err, fault.NoCapacity):
					full++
				default:
					t.Error(err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if placed != 2*each || full != each {
		t.Errorf("%d placed and %d refused, want %d and %d", placed, full, 2*each, each)
	}
	rows, err := f.sql.Query(ctx, "SELECT count(*) FROM sandboxes GROUP BY host_id")
	if err != nil {
		t.Fatal(err)
	}
	counts, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil || len(counts) != 2 || counts[0] != each || counts[1] != each {
		t.Errorf("hosts have %v, %v", counts, err)
	}
	if _, err := f.Places(ctx, uuid.New(), req); !fault.Is(err, fault.NoCapacity) {
		t.Errorf("a template that no host has: %v", err)
	}

	// One host's disk is full; the other's has room for one pause, which an existing
	// sandbox may need.
	f.exec("DELETE FROM sandboxes")
	f.exec("UPDATE hosts SET disk_bytes = 1::bigint << 40, disk_free_bytes = CASE WHEN url = 'unix:/h1' THEN 200 << 20 ELSE 0 END")
	req.DiskMiB = 128
	places, err := f.Places(ctx, template, req)
	if err != nil || len(places) != 1 || places[0].URL != "unix:/h1" {
		t.Fatalf("hosts with room on their disks: %v, %v", places, err)
	}
	f.exec("INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, on_timeout) VALUES (gen_random_uuid(), $1, $2, $3, 'x', 'running', 1, 128, 0, 0, '{}', now(), 'pause')", uuid.Nil, places[0].ID, template)
	if _, err := f.Places(ctx, template, req); !fault.Is(err, fault.NoCapacity) {
		t.Errorf("a disk whose room is reserved: %v", err)
	}
	if err := f.Store.InTx(ctx, func(q *db.Queries) error { return f.Reserve(ctx, q, places[0].ID, req) }); !fault.Is(err, fault.NoCapacity) {
		t.Errorf("a reservation on it: %v", err)
	}
	f.exec("UPDATE sandboxes SET state = 'paused'") // Its files are written, so the room is used.
	if _, err := f.Places(ctx, template, req); err != nil {
		t.Errorf("once it is saved: %v", err)
	}
}

// TestUsedLately checks that a request that must not arrive twice reaches an agent over a
// connection used within [upstream.HopOnceIdle] or over a new one. A stopping agent
// relies on that.
func TestUsedLately(t *testing.T) {
	from := make(chan string, 1)
	agent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { from <- r.RemoteAddr }))
	defer agent.Close()
	h := (&Registry{}).newHost(db.Host{URL: &agent.URL}, "token")
	defer h.close()
	ask := func() string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, agent.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := h.Transport().RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return await.Recv(t, "the request", from)
	}
	first, answered := ask(), time.Now()
	await.Until(t, "the connection is too old", func() bool { return time.Since(answered) > upstream.HopOnceIdle })
	if ask() == first {
		t.Error("two requests came over one connection")
	}
}

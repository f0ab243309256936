package notify

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/mail/mailtest"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestDial checks that the dialled address decides, whatever a name or a redirect says.
func TestDial(t *testing.T) {
	reached := false
	inside := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer inside.Close()
	_, port, _ := net.SplitHostPort(inside.Listener.Addr().String())
	c := newClient(false)
	for _, to := range []string{inside.URL, "http://localhost:" + port, "http://[::ffff:127.0.0.1]:" + port, "http://2130706433:" + port, "http://0x7f.1:" + port, "http://[::1]:" + port, "http://0:" + port} {
		if status, err := c.post(t.Context(), to, http.Header{}, nil); err == nil || status != 0 {
			t.Errorf("%s: %d, %v", to, status, err)
		}
	}
	if reached {
		t.Error("an address of this machine was called")
	}
	// Each dial resolves a name again, however often it changes.
	var lookups atomic.Int32
	names(t, func() []netip.Addr {
		all := [][]netip.Addr{{netip.MustParseAddr("192.0.2.1")}, {netip.MustParseAddr("127.0.0.1")}, {netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("127.0.0.1")}, {netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("127.0.0.1")}}
		return all[int(lookups.Add(1)-1)%len(all)]
	})
	for range 6 {
		if status, err := c.post(t.Context(), "http://rebinds.example:"+port, http.Header{}, nil); !errors.Is(err, netaddr.ErrNotAllowed) || status != 0 || reached {
			t.Errorf("a name that changes: %d, %v, reached: %v", status, err, reached)
		}
	}
	if n := lookups.Load(); n < 6 {
		t.Errorf("%d lookups for 6 attempts", n)
	}
	// No redirect is followed, even if private addresses are allowed.
	away := httptest.NewServer(http.RedirectHandler(inside.URL, http.StatusTemporaryRedirect))
	defer away.Close()
	if status, err := newClient(true).post(t.Context(), away.URL, http.Header{}, nil); err == nil || status != 307 || reached {
		t.Errorf("redirect: %d, %v, %v", status, err, reached)
	}
	// Addresses of guests and metadata services are always refused.
	for _, private := range []bool{false, true} {
		for _, to := range []string{"http://10.11.0.7:49983/", "http://[::ffff:10.11.0.7]/", "http://[64:ff9b::a0b:7]/", "http://169.254.169.254/latest"} {
			if status, err := newClient(private).post(t.Context(), to, http.Header{}, nil); !errors.Is(err, netaddr.ErrNotAllowed) || status != 0 {
				t.Errorf("%s, private addresses allowed: %v: %d, %v", to, private, status, err)
			}
			s := &Service{}
			s.Private = private
			if err := s.check(Slack, target{URL: to}); !fault.Is(err, fault.InvalidArgument) {
				t.Errorf("%s, private addresses allowed: %v: %v", to, private, err)
			}
		}
	}
	for _, to := range []string{"http://[::1]/", "https://10.0.0.1/", "http://169.254.169.254/latest"} {
		if err := (&Service{}).check(Slack, target{URL: to}); !fault.Is(err, fault.InvalidArgument) {
			t.Errorf("%s: %v", to, err)
		}
	}
}

// TestProblems checks that teams never see messages of the dialler, of TLS or of a mail
// server.
func TestProblems(t *testing.T) {
	closed := httptest.NewServer(nil)
	closed.Close()
	secured := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer secured.Close()
	secured.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	answers := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(418) }))
	defer answers.Close()
	breaks := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	defer breaks.Close()
	const lost = "cannot connect, or the connection closed early"
	for to, want := range map[string]string{
		closed.URL: lost, secured.URL: lost, breaks.URL: lost, "http://x.invalid/": lost,
		answers.URL: "the receiver responded with status 418", "http://169.254.169.254/": netaddr.ErrNotAllowed.Error(),
	} {
		status, err := newClient(true).post(t.Context(), to, http.Header{}, nil)
		if got := (outcome{status: status, err: err}).problem(); got != want || err == nil {
			t.Errorf("%s: %q, want %q; %v", to, got, want, err)
		}
	}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, ""},
		{fmt.Errorf("post: %w", os.ErrDeadlineExceeded), "the receiver did not respond in time"},
		{context.DeadlineExceeded, "the receiver did not respond in time"},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded, Addr: &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3)}}, "the receiver did not respond in time"},
		{errors.New("dial tcp 10.1.2.3:25: connect: connection refused"), lost},
		{mail.ErrNoServer, mail.ErrNoServer.Error()},
	} {
		if got := (outcome{err: tt.err}).problem(); got != tt.want {
			t.Errorf("%v: %q, want %q", tt.err, got, tt.want)
		}
	}
}

// names makes the test's name server resolve every name to the IPv4 addresses that answer
// returns.
func names(t *testing.T, answer func() []netip.Addr) {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m.Response, m.Additionals = true, nil
			if q.Type == dnsmessage.TypeA {
				for _, a := range answer() {
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}, Body: &dnsmessage.AResource{A: a.As4()}})
				}
			}
			if b, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(b, from)
			}
		}
	}()
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		conn.Close()
		<-done
	})
}

// TestSeal checks that only a target's own channel can unseal it.
func TestSeal(t *testing.T) {
	s, err := New(Config{Secret: []byte(strings.Repeat("k", 32))})
	if err != nil {
		t.Fatal(err)
	}
	c := db.Channel{ID: uuid.New()}
	want := target{URL: "https://example.com/token", Secret: "hunter2hunter2hunter2"}
	if c.Sealed, err = s.seal(c.ID, want); err != nil {
		t.Fatal(err)
	}
	if got, err := s.open(c); err != nil || got != want {
		t.Errorf("%v, %v", got, err)
	}
	if strings.Contains(string(c.Sealed), "hunter2") || strings.Contains(string(c.Sealed), "example") {
		t.Error("it is not encrypted")
	}
	other := c
	other.ID = uuid.New()
	if _, err := s.open(other); err == nil {
		t.Error("another channel's target was read")
	}
	other = c
	other.Sealed = slices.Clone(c.Sealed)
	other.Sealed[len(other.Sealed)-1] ^= 1
	if _, err := s.open(other); err == nil {
		t.Error("a modified target was read")
	}
	second, err := New(Config{Secret: []byte(strings.Repeat("x", 32))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.open(c); err == nil {
		t.Error("another installation read it")
	}
}

func TestWait(t *testing.T) {
	for n := int32(1); n < 40; n++ {
		if d := wait(n); d < minWait/2 || d > maxWait*3/2 {
			t.Errorf("after %d: %v", n, d)
		}
	}
}

// receiver is a webhook that fails on demand.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	fail   bool
	got    []*http.Request
	bodies []string
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.fail {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		r.got, r.bodies = append(r.got, req), append(r.bodies, string(body))
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) received() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.bodies)
}

type bench struct {
	*testing.T
	*Service
	conn *pgx.Conn
	team uuid.UUID
}

func newBench(t *testing.T, url string) *bench {
	st, err := store.Open(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	messages, err := mail.New("", "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	// Without Redis, it keeps its own counts.
	away := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }})
	t.Cleanup(func() { away.Close() })
	s, err := New(Config{
		Store: st, Secret: []byte(strings.Repeat("k", 32)), Mail: messages, Limiter: ratelimit.New(away, slog.New(slog.DiscardHandler)), PublicURL: "http://localhost:8000/",
		Private: true, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{T: t, Service: s, conn: pgtest.Connect(t, url), team: uuid.New()}
}

func (b *bench) exec(sql string, args ...any) {
	b.Helper()
	if _, err := b.conn.Exec(context.Background(), sql, args...); err != nil {
		b.Fatalf("%s: %v", sql, err)
	}
}

func (b *bench) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); b.Service.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	b.Cleanup(stop)
	return stop
}

func (b *bench) eventually(what string, ok func() bool) {
	b.Helper()
	await.Until(b.T, what, ok)
}

func (b *bench) channel(kind, url string, events ...string) db.Channel {
	b.Helper()
	name, secret := "c", strings.Repeat("s", 20)
	p := Params{Kind: kind, Name: &name, Events: events, URL: &url}
	if kind == Webhook {
		p.Secret = &secret
	}
	c, err := b.Create(context.Background(), b.team, true, p)
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// TestEachKind creates a channel of each kind, and delivers to it.
func TestEachKind(t *testing.T) {
	b := newBench(t, storetest.New(t))
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
	post := mailtest.Start(t, mailtest.Options{})
	var err error
	if b.Mail, err = mail.New("smtp://"+post.Addr+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	to := newReceiver(t)
	for _, kind := range kinds {
		var c db.Channel
		if kind == Email {
			name, address := "c", "ops@example.com"
			if c, err = b.Create(t.Context(), b.team, true, Params{Kind: kind, Name: &name, Events: []string{"sandbox.ended"}, Address: &address}); err != nil {
				t.Fatal(err)
			}
			b.exec("UPDATE channels SET confirmed_at = now() WHERE id = $1", c.ID)
		} else {
			c = b.channel(kind, to.URL, "sandbox.ended")
		}
		if d, err := b.Test(t.Context(), b.team, c.ID); err != nil || d.State != "delivered" {
			t.Errorf("%s: %+v, %v", kind, d, err)
		}
	}
}

// TestDeliveries delivers real changes through two servers, while the receiver sometimes
// fails.
func TestDeliveries(t *testing.T) {
	url := storetest.New(t)
	b := newBench(t, url)
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
	hook, slack, discord := newReceiver(t), newReceiver(t), newReceiver(t)
	c := b.channel(Webhook, hook.URL+"/in?token=secret", "sandbox.started", "sandbox.ended")
	b.channel(Slack, slack.URL, "sandbox.started")
	b.channel(Discord, discord.URL, "sandbox.ended", "host.unreachable", "build.finished")
	if c.Target != hook.URL {
		t.Errorf("target %q", c.Target)
	}
	post := mailtest.Start(t, mailtest.Options{})
	messages, err := mail.New("smtp://"+post.Addr+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	name, address := "c", "ops@example.com"
	if _, err := b.Create(t.Context(), b.team, true, Params{Kind: Email, Name: &name, Events: []string{"sandbox.ended"}, Address: &address}); err != nil {
		t.Fatal(err)
	}
	b.exec("UPDATE channels SET confirmed_at = now()")
	// The database has no usable secret of a channel.
	var plain int
	if err := b.conn.QueryRow(t.Context(), "SELECT count(*) FROM channels c WHERE c::text LIKE '%token=secret%' OR c::text LIKE '%ssssssss%' OR position('secret'::bytea in sealed) > 0").Scan(&plain); err != nil || plain != 0 {
		t.Errorf("%d channels show their secrets: %v", plain, err)
	}
	second := newBench(t, url)
	b.Mail, second.Mail = messages, messages
	b.run()
	second.run()

	sandbox := uuid.New()
	b.exec(`INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
		VALUES ($1, $2, $3, '<minimal>', 'starting', 1, 128, 0, 0, '{"k":"v"}', now())`, sandbox, b.team, uuid.Nil)
	b.exec("UPDATE sandboxes SET state = 'running', started_at = now() WHERE id = $1", sandbox)
	b.eventually("the start is delivered", func() bool { return len(hook.received()) == 1 && len(slack.received()) == 1 })
	var m Message
	if err := json.Unmarshal([]byte(hook.received()[0]), &m); err != nil || m.Event != "sandbox.started" || !strings.HasPrefix(m.Data["sandbox_id"].(string), "cl-") || m.At == "" {
		t.Errorf("message %+v, %v", m, err)
	}
	// Check the signature as a receiver would, without this package.
	header := hook.got[0].Header
	stamp, sum, _ := strings.Cut(header.Get("Wrenn-Signature"), ",v1=")
	stamp = strings.TrimPrefix(stamp, "t=")
	mac := hmac.New(sha256.New, []byte(strings.Repeat("s", 20)))
	fmt.Fprintf(mac, "%s.%s", stamp, hook.received()[0])
	secs, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || sum != hex.EncodeToString(mac.Sum(nil)) || time.Since(time.Unix(secs, 0)).Abs() > 5*time.Minute || header.Get("Wrenn-Delivery") != m.ID.String() || header.Get("Wrenn-Event") != m.Event {
		t.Errorf("header %v, %v", header, err)
	}
	var said map[string]any
	wire := m.Data["sandbox_id"].(string)
	if err := json.Unmarshal([]byte(slack.received()[0]), &said); err != nil || len(said) != 1 || said["text"] != "Sandbox "+wire+" (&lt;minimal&gt;): started." {
		t.Errorf("Slack got %v", said)
	}

	// A failed delivery is retried, and delivered once.
	hook.mu.Lock()
	hook.fail = true
	hook.mu.Unlock()
	b.exec("UPDATE sandboxes SET state = 'stopped', end_reason = 'expired', ended_at = now() WHERE id = $1", sandbox)
	b.eventually("the end is delivered to the other channels", func() bool { return len(discord.received()) == 1 })
	if err := json.Unmarshal([]byte(discord.received()[0]), &said); err != nil || said["content"] != "Sandbox "+wire+" (<minimal>): ended. Reason: expired." || fmt.Sprint(said["allowed_mentions"]) != "map[parse:[]]" {
		t.Errorf("Discord got %v", said)
	}
	if l := <-post.Messages; l.To != address || l.From != "wrenn@example.com" || l.Subject != "Wrenn: sandbox.ended" || strings.TrimSpace(l.Text) != "Sandbox "+wire+" (<minimal>): ended. Reason: expired." {
		t.Errorf("mail %+v", l)
	}
	last := func() db.Delivery {
		rows, _, err := b.Deliveries(t.Context(), b.team, c.ID, "", 10)
		if err != nil || len(rows) == 0 {
			t.Fatalf("deliveries: %v, %v", rows, err)
		}
		return rows[0]
	}
	b.eventually("it failed", func() bool { return last().Status == 503 })
	if d := last(); d.State != "pending" || d.Error == "" || strings.Contains(d.Error, "secret") || !d.NextAt.After(time.Now()) {
		t.Errorf("delivery: %+v", d)
	}
	// This is written after the delivery.
	b.eventually("the channel is marked as failing", func() bool {
		got, err := b.Get(t.Context(), b.team, c.ID)
		return err == nil && got.FailingSince != nil
	})
	hook.mu.Lock()
	hook.fail = false
	hook.mu.Unlock()
	b.exec("UPDATE deliveries SET next_at = now()")
	b.exec("SELECT pg_notify('wrenn_deliveries', '')")
	b.eventually("it is delivered", func() bool { return last().State == "delivered" })
	b.eventually("the channel works again", func() bool {
		got, err := b.Get(t.Context(), b.team, c.ID)
		return err == nil && got.FailingSince == nil
	})
	if n := len(hook.received()); n != 2 {
		t.Errorf("delivered %d times", n)
	}

	// Many events, through two servers: each is delivered once.
	for range 40 {
		b.exec("SELECT notify_channels($1, 'sandbox.started', '{}')", b.team)
	}
	b.eventually("everything is delivered", func() bool { return len(hook.received()) >= 42 })
	seen := make(map[string]int)
	for _, body := range hook.received() {
		var m Message
		if err := json.Unmarshal([]byte(body), &m); err != nil {
			t.Fatal(err)
		}
		if seen[m.ID.String()]++; seen[m.ID.String()] > 1 {
			t.Errorf("%s was delivered twice", m.ID)
		}
	}

	// Events of the platform go only to its admins' channels.
	b.exec("INSERT INTO hosts (id, name, status) VALUES ($1, 'h', 'online')", uuid.New())
	b.exec("UPDATE hosts SET status = 'unreachable'")
	b.eventually("the host's absence is delivered", func() bool { return len(discord.received()) == 2 })
	if _, err := b.Create(t.Context(), b.team, false, Params{Kind: Slack, Name: new(string), Events: []string{"host.online"}, URL: &slack.URL}); !fault.Is(err, fault.PermissionDenied) {
		t.Errorf("a team's channel gets events of hosts: %v", err)
	}
	if err := b.Quota(t.Context(), b.team, "no more"); err != nil {
		t.Error(err)
	}
}

// TestGivingUp checks that a channel that keeps failing is disabled.
func TestGivingUp(t *testing.T) {
	b := newBench(t, storetest.New(t))
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
	hook := newReceiver(t)
	hook.fail = true
	c := b.channel(Slack, hook.URL, "quota.reached")
	b.exec("UPDATE channels SET failing_since = now() - interval '4 days'")
	b.run()
	if err := b.Quota(t.Context(), b.team, ""); err != nil {
		t.Fatal(err)
	}
	b.eventually("the channel is disabled", func() bool {
		got, err := b.Get(t.Context(), b.team, c.ID)
		return err == nil && !got.Enabled && strings.Contains(got.DisabledReason, "503")
	})
	yes := true
	got, err := b.Update(t.Context(), b.team, c.ID, true, Params{Enabled: &yes})
	if err != nil || !got.Enabled || got.FailingSince != nil || got.DisabledReason != "" {
		t.Errorf("enabled again: %+v, %v", got, err)
	}
	// After the last attempt, the delivery fails for good.
	b.exec("UPDATE deliveries SET state = 'pending', attempts = $1, next_at = now()", attempts-1)
	b.exec("SELECT pg_notify('wrenn_deliveries', '')")
	b.eventually("the delivery has failed for good", func() bool {
		rows, _, err := b.Deliveries(t.Context(), b.team, c.ID, "", 10)
		return err == nil && len(rows) == 1 && rows[0].State == "failed" && rows[0].Attempts == attempts
	})
	b.exec("UPDATE deliveries SET created_at = now() - interval '8 days'")
	if err := b.forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rows, _, err := b.Deliveries(t.Context(), b.team, c.ID, "", 10); err != nil || len(rows) != 0 {
		t.Errorf("old deliveries: %v, %v", rows, err)
	}
	// Without a mail server, a mail channel's test says so.
	address := "a@example.com"
	c, err = b.Create(t.Context(), b.team, false, Params{Kind: Email, Name: new(string), Events: []string{"quota.reached"}, Address: &address})
	if err != nil {
		t.Fatal(err)
	}
	b.exec("UPDATE channels SET confirmed_at = now()")
	if d, err := b.Test(t.Context(), b.team, c.ID); err != nil || d.State != "failed" || d.Error != mail.ErrNoServer.Error() {
		t.Errorf("test: %+v, %v", d, err)
	}
}

// TestQueueDepth counts deliveries that are due and those that are due later.
func TestQueueDepth(t *testing.T) {
	b := newBench(t, storetest.New(t))
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", b.team)
	b.channel(Slack, newReceiver(t).URL, "quota.reached")
	if err := b.Quota(t.Context(), b.team, ""); err != nil {
		t.Fatal(err)
	}
	for at, want := range map[string]map[string]int64{"-1": {due: 1, later: 0}, "1": {due: 0, later: 1}} {
		b.exec("UPDATE deliveries SET next_at = now() + make_interval(hours => $1::text::int)", at)
		if got, err := b.count(t.Context()); err != nil || !maps.Equal(got, want) {
			t.Errorf("due in %s h: %v, %v", at, got, err)
		}
	}
}

// TestConfirmation checks that an address gets nothing until its recipient has confirmed
// it, and that nobody can have many mails sent to it.
func TestConfirmation(t *testing.T) {
	b := newBench(t, storetest.New(t))
	other := uuid.New()
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'Buy now http://spam.example'), ($2, 'other')", b.team, other)
	post := mailtest.Start(t, mailtest.Options{})
	messages, err := mail.New("smtp://"+post.Addr+"?tls=none", "wrenn@example.com", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.Mail = messages
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { messages.Run(ctx) })
	defer wg.Wait()
	defer stop()
	link := func(to string) (token string) {
		t.Helper()
		select {
		case l := <-post.Messages:
			_, token, ok := strings.Cut(l.Text, "http://localhost:8000/confirm-channel#token=")
			token, _, _ = strings.Cut(token, "\n")
			if l.To != to || !ok || strings.Contains(l.Text+l.Subject, "spam") {
				t.Fatalf("mail to %s: %q", l.To, l.Text)
			}
			return strings.TrimSpace(token)
		case <-time.After(await.Hang):
			t.Fatal("no mail was sent")
		}
		return ""
	}
	name := "Buy now http://spam.example"
	create := func(team uuid.UUID, address string) (db.Channel, error) {
		return b.Create(t.Context(), team, false, Params{Kind: Email, Name: &name, Events: []string{"quota.reached"}, Address: &address})
	}
	emit := func() (n int) {
		t.Helper()
		b.exec("DELETE FROM deliveries")
		b.exec("SELECT notify_channels(NULL, 'quota.reached', '{}')")
		if err := b.conn.QueryRow(t.Context(), "SELECT count(*) FROM deliveries").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	fails := func(what string, err error, code fault.Code) {
		t.Helper()
		if !fault.Is(err, code) {
			t.Errorf("%s: %v, want %s", what, err, code)
		}
	}
	c, err := create(b.team, "ops@example.com")
	if err != nil || c.ConfirmedAt != nil {
		t.Fatalf("created: %+v, %v", c, err)
	}
	first := link("ops@example.com")
	_, err = b.Test(t.Context(), b.team, c.ID)
	fails("a test before it is confirmed", err, fault.Conflict)
	if n := emit(); n != 0 {
		t.Errorf("%d events are delivered before it is confirmed", n)
	}
	// The address has had its mail, whoever asks and however it is written.
	for _, team := range []uuid.UUID{b.team, other} {
		_, err = create(team, "Ops@example.com")
		fails("a second mail", err, fault.RateLimited)
	}
	fails("a second mail of the same", b.AskConfirmation(t.Context(), b.team, c.ID), fault.RateLimited)
	for _, wrong := range []string{"", first + "x", "wrc_", first[:len(first)-1]} {
		fails("another token", b.Confirm(t.Context(), wrong), fault.Unauthenticated)
	}
	// Another address gets its own link; the first link becomes invalid.
	b.exec("UPDATE channels SET confirmed_at = now()")
	second := "more@example.com"
	if c, err = b.Update(t.Context(), b.team, c.ID, false, Params{Address: &second}); err != nil || c.ConfirmedAt != nil {
		t.Fatalf("changed: %+v, %v", c, err)
	}
	fails("the link of the address before", b.Confirm(t.Context(), first), fault.Unauthenticated)
	token := link(second)
	b.exec("UPDATE channels SET confirm_until = now()")
	fails("an old link", b.Confirm(t.Context(), token), fault.Unauthenticated)
	b.exec("UPDATE channels SET confirm_until = now() + interval '1 minute'")
	if err := b.Confirm(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	fails("a used link", b.Confirm(t.Context(), token), fault.Unauthenticated)
	if d, err := b.Test(t.Context(), b.team, c.ID); err != nil || d.State != "delivered" {
		t.Errorf("test: %+v, %v", d, err)
	}
	if l := <-post.Messages; l.To != second {
		t.Errorf("mail to %s", l.To)
	}
	if n := emit(); n != 1 {
		t.Errorf("%d events are delivered, want 1", n)
	}
	fails("confirmed already", b.AskConfirmation(t.Context(), b.team, c.ID), fault.Conflict)
	// Other changes do not affect the confirmation, nor does another channel of the team
	// for the same address.
	if c, err = b.Update(t.Context(), b.team, c.ID, false, Params{Name: new(string), Address: &second}); err != nil || c.ConfirmedAt == nil {
		t.Errorf("renamed: %+v, %v", c, err)
	}
	if c, err := create(b.team, "More@example.com"); err != nil || c.ConfirmedAt == nil {
		t.Errorf("another channel to the same address: %+v, %v", c, err)
	}
	// An owner's teams share one limit, whatever the number of addresses.
	owner := uuid.New()
	b.exec("INSERT INTO users (id, email) VALUES ($1, 'a@example.com')", owner)
	b.exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $3, 'owner'), ($2, $3, 'owner')", b.team, other, owner)
	sent := 0
	for i := range 2 * limitMails.Burst {
		address := fmt.Sprintf("ops+%d@example.com", i)
		if _, err := create([]uuid.UUID{b.team, other}[i%2], address); err == nil {
			sent++
			link(address)
		} else if !fault.Is(err, fault.RateLimited) {
			t.Fatal(err)
		}
	}
	if sent != limitMails.Burst {
		t.Errorf("%d mails were sent, want %d", sent, limitMails.Burst)
	}
	// An address that was refused to them can get a mail from somebody else.
	third, last := uuid.New(), fmt.Sprintf("ops+%d@example.com", 2*limitMails.Burst-1)
	b.exec("INSERT INTO teams (id, name) VALUES ($1, 'third')", third)
	if _, err := create(third, last); err != nil {
		t.Fatal(err)
	}
	link(last)
}

package server_test

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/metrics"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/usage"
)

// TestUsage pauses and forks a sandbox and checks its usage.
func TestUsage(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	begun := time.Now()
	sandbox := p.create(map[string]any{"vcpus": 2, "memory_mib": 2048})
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/resume", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/fork", map[string]any{"count": 2}).want(201)
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	// Another server continues what this one began.
	p.end()
	p.start()

	today := time.Now().UTC().Format(time.DateOnly)
	u := p.call("GET", "/v1/usage?from="+begun.UTC().Format(time.DateOnly)+"&to="+today, nil).want(200).object()
	total := u["total"].(map[string]any)
	most := 6 * time.Since(begun).Seconds()
	if n := total["sandbox_starts"]; n != 3. {
		t.Errorf("%v starts, want 3", n)
	}
	cpu, mem := total["vcpu_seconds"].(float64), total["memory_gib_seconds"].(float64)
	if cpu <= 0 || cpu > most || mem < 0.999*cpu || mem > 1.001*cpu {
		t.Errorf("%v vCPU-seconds and %v GiB-seconds, of at most %v", cpu, mem, most)
	}
	// A run over midnight counts on both days and starts on the first. Aggregating the
	// finished day changes nothing.
	p.sql("UPDATE sandbox_runs SET started_at = (date_trunc('day', now() AT TIME ZONE 'UTC') - interval '1 hour') AT TIME ZONE 'UTC' WHERE ended_at IS NULL")
	yesterday := time.Now().UTC().AddDate(0, 0, -1).Format(time.DateOnly)
	before := func() map[string]any {
		t.Helper()
		for _, d := range p.call("GET", "/v1/usage?from="+yesterday+"&to="+today, nil).want(200).list("days") {
			if d := d.(map[string]any); d["day"] == yesterday {
				return d["amount"].(map[string]any)
			}
		}
		t.Fatal("nothing was used yesterday")
		return nil
	}
	for range 2 {
		if a := before(); a["vcpu_seconds"] != 2*2*3600. || a["memory_gib_seconds"] != 2*2*3600. || a["sandbox_starts"] != 2. {
			t.Errorf("used by two sandboxes in an hour before midnight: %v", a)
		}
		rolled, err := store.Open(t.Context(), p.config.DatabaseURL)
		if err != nil {
			t.Fatal(err)
		}
		err = usage.New(rolled, slog.New(slog.DiscardHandler)).Roll(t.Context())
		rolled.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	other := p.newTeam()
	if days := p.call("GET", "/v1/usage", nil, "X-API-Key", other).want(200).list("days"); len(days) != 0 {
		t.Errorf("another team's usage is %v", days)
	}
	p.call("GET", "/v1/admin/usage", nil, "X-API-Key", other).fails(403, "permission_denied")
	teams := p.call("GET", "/v1/admin/usage?limit=1", nil).want(200).list("teams")
	if len(teams) != 1 || teams[0].(map[string]any)["name"] != "default" {
		t.Errorf("teams: %v", teams)
	}
	p.call("GET", "/v1/usage?from=2026-01-02&to=2026-01-01", nil).fails(400, "invalid_argument")
	p.call("GET", "/v1/usage?from=yesterday", nil).fails(400, "invalid_argument")
	p.call("GET", "/v1/usage?from=2020-01-01&to=2026-01-01", nil).fails(400, "invalid_argument")
}

// audit returns the newest record of each action.
func (p *plane) audit(query string) map[string]map[string]any {
	p.Helper()
	records := make(map[string]map[string]any)
	for _, r := range p.call("GET", "/v1/audit?limit=1000&"+query, nil).want(200).list("records") {
		record := r.(map[string]any)
		if action := record["action"].(string); records[action] == nil {
			records[action] = record
		}
	}
	return records
}

func TestAudit(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{"envs": map[string]string{"SECRET": "hunter2"}, "metadata": map[string]string{"k": "hunter2"}})
	base := "/v1/sandboxes/" + sandbox
	p.call("POST", base+"/exec", map[string]any{"cmd": "hunter2"}, "X-Request-Id", "called-so", "X-Forwarded-For", "203.0.113.9, 198.51.100.7")
	p.call("POST", base+"/pause", nil).want(200)
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "nothing"}).fails(404, "not_found")
	p.call("POST", "/v1/sandboxes", nil, "X-API-Key", "wrn_00000000000000000000000000").fails(401, "unauthenticated")
	p.call("POST", "/v1/sandboxes", nil, "X-API-Key", p.newTeam()).fails(400, "invalid_argument")
	p.call("DELETE", base, nil).want(204)

	all := p.audit("")
	for action, want := range map[string][3]string{
		"createSandbox": {"", "refused", "not_found"}, "pauseSandbox": {sandbox, "ok", ""}, "deleteSandbox": {sandbox, "ok", ""},
	} {
		r := all[action]
		if r == nil || r["object"] != want[0] || r["result"] != want[1] || r["code"] != want[2] || r["object_kind"] != "sandbox" || r["actor_kind"] != "key" ||
			!strings.HasPrefix(fmt.Sprint(r["actor"]), "key-") || r["team_id"] == nil || r["address"] != "127.0.0.1" {
			t.Errorf("%s: %v", action, r)
		}
	}
	if r := all["exec"]; r == nil || r["request_id"] != "ext-called-so" || r["address"] != "198.51.100.7" {
		t.Errorf("exec: %v", r)
	}
	if made := p.audit("action=createSandbox&result=ok")["createSandbox"]; made == nil || made["object"] != sandbox {
		t.Errorf("the creation: %v", made)
	}
	for query, want := range map[string]int{
		"object=" + sandbox: 4, "object=cl-0000000000000000000000000": 0, "actor=key": 5, "actor=platform": 0,
		"actor=" + all["exec"]["actor"].(string): 5, "result=refused": 2, "from=2100-01-01T00:00:00Z": 0, "to=2000-01-01T00:00:00Z": 0,
	} {
		if got := len(p.call("GET", "/v1/audit?"+query, nil).want(200).list("records")); got != want {
			t.Errorf("%s: %d records, want %d", query, got, want)
		}
	}
	// The pages together equal the whole list.
	var paged []any
	for cursor := ""; ; {
		page := p.call("GET", "/v1/audit?limit=2"+cursor, nil).want(200)
		paged = append(paged, page.list("records")...)
		if page.str("next_cursor") == "" {
			break
		}
		cursor = "&cursor=" + page.str("next_cursor")
	}
	if len(paged) != 5 {
		t.Errorf("%d records by pages", len(paged))
	}
	p.call("GET", "/v1/audit?cursor=x", nil).fails(400, "invalid_argument")
	lines := p.call("GET", "/v1/audit?format=ndjson", nil).want(200)
	if n := strings.Count(string(lines.Body), "\n"); n != 5 || lines.Header.Get("Content-Type") != "application/x-ndjson" {
		t.Errorf("%d lines of %s", n, lines.Header.Get("Content-Type"))
	}
	table, err := csv.NewReader(bytes.NewReader(p.call("GET", "/v1/audit?format=csv", nil).want(200).Body)).ReadAll()
	if err != nil || len(table) != 6 || table[0][0] != "at" {
		t.Errorf("CSV: %v, %v", table, err)
	}
	if strings.Contains(string(lines.Body), "hunter2") {
		t.Error("a body was recorded")
	}
	if n := len(p.call("GET", "/v1/admin/audit", nil).want(200).list("records")); n != 6 {
		t.Errorf("%d records in all, want 6", n)
	}
}

// TestAuditOfItself checks that each event which nobody asked for is recorded once, with
// its actor.
func TestAuditOfItself(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	expired, missing := p.create(map[string]any{"timeout_seconds": 1}), ""
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, expired, "")
	p.eventually("it is recorded that the sandbox expired", func() bool { return p.audit("")["sandbox.expired"] != nil })
	if r := p.audit("")["sandbox.expired"]; r["object"] != expired || r["actor_kind"] != "host" || !strings.HasPrefix(r["actor"].(string), "hst-") {
		t.Errorf("expired: %v", r)
	}
	missing = p.create(map[string]any{})
	conn, err := pgx.Connect(t.Context(), p.config.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, sql := range []string{
		"UPDATE sandboxes SET state = 'missing' WHERE state = 'running'", "UPDATE hosts SET status = 'unreachable'",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if r := p.audit("")["sandbox.missing"]; r == nil || r["object"] != missing || r["actor"] != "platform" {
		t.Errorf("missing: %v", r)
	}
	found := false
	for _, r := range p.call("GET", "/v1/admin/audit?action=host.unreachable", nil).want(200).list("records") {
		found = found || strings.HasPrefix(r.(map[string]any)["object"].(string), "hst-")
	}
	if !found {
		t.Error("the host's absence is not recorded")
	}
	if p.audit("")["host.unreachable"] != nil {
		t.Error("a team sees the platform's records")
	}
}

// TestAuditBeforeAnswer checks that the server acknowledges no change whose record it
// cannot write.
func TestAuditBeforeAnswer(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	conn, err := pgx.Connect(t.Context(), p.config.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "ALTER TABLE audit_records ADD CONSTRAINT broken CHECK (action <> 'pingSandbox')"); err != nil {
		t.Fatal(err)
	}
	p.call("POST", "/v1/sandboxes/"+sandbox+"/ping", nil).fails(503, "unavailable")
	if p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("state") != "running" {
		t.Error("reads need records")
	}
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
}

// TestCommandsRecord checks that the record of a command is written while the command
// runs, that it is replaced if the command does not start, and that no command is
// acknowledged without one.
func TestCommandsRecord(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	path := "/v1/sandboxes/" + p.create(map[string]any{}) + "/exec"
	release := make(chan struct{})
	p.agent.hook(func(ctx context.Context, call string) error {
		if call == "run" {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		return nil
	})
	ran := make(chan error, 1)
	go func() {
		r, err := p.try("POST", path, map[string]any{"cmd": "say"})
		if err == nil && r.Status != http.StatusOK {
			err = fmt.Errorf("%d %s", r.Status, r.Body)
		}
		ran <- err
	}()
	records := func() (all []string) {
		for _, r := range p.call("GET", "/v1/audit?action=exec", nil).want(200).list("records") {
			r := r.(map[string]any)
			all = append(all, fmt.Sprint(r["result"], r["code"]))
		}
		slices.Sort(all)
		return all
	}
	p.eventually("a command that runs has a record", func() bool { return slices.Equal(records(), []string{"ok"}) })
	close(release)
	if err := await.Recv(t, "the command's end", ran); err != nil {
		t.Fatal(err)
	}
	p.call("POST", path, map[string]any{"cmd": "missing"}).fails(422, "command_not_found")
	p.call("POST", "/v1/sandboxes/cl-0000000000000000000000000/exec", map[string]any{"cmd": "say"}).fails(404, "not_found")
	if got, want := records(), []string{"ok", "refusedcommand_not_found", "refusednot_found"}; !slices.Equal(got, want) {
		t.Errorf("the records say %q, want %q", got, want)
	}
	p.sql("ALTER TABLE audit_records ADD CONSTRAINT broken CHECK (action <> 'exec') NOT VALID")
	p.call("POST", path, map[string]any{"cmd": "say"}).fails(503, "unavailable")
}

func TestMetricsHistory(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox
	points := func(window string) []any {
		p.Helper()
		return p.call("GET", base+"/metrics/history"+window, nil).want(200).list("points")
	}
	p.eventually("there are two points", func() bool { return len(points("")) >= 2 })
	last := points("?window=10m")[1].(map[string]any)
	if pct, _ := last["cpu_used_pct"].(float64); pct < 5 || pct > 50 || last["memory_bytes"] != float64(1<<28) || last["disk_bytes"] != float64(1<<20) {
		t.Errorf("point: %v", last)
	}
	for _, window := range []string{"2h", "24h"} {
		if n := len(points("?window=" + window)); n != 1 && n != 2 {
			t.Errorf("%s: %d points", window, n)
		}
	}
	if n := p.agent.called("samples"); n > len(points(""))+1 {
		t.Errorf("%d calls for %d points", n, len(points("")))
	}
	kinds := []string{"?window=10m", "?window=2h", "?window=24h"}
	had := make(map[string]int)
	for _, window := range kinds {
		had[window] = len(points(window))
	}
	p.call("POST", base+"/pause", nil).want(200)
	p.call("POST", base+"/resume", nil).want(200)
	p.call("POST", base+"/pause", nil).want(200)
	for _, window := range kinds {
		if n := len(points(window)); n < had[window] || n < 1 {
			t.Errorf("%s: of %d points a pause leaves %d", window, had[window], n)
		}
	}
	p.call("GET", base+"/metrics/history?window=1h", nil).fails(400, "invalid_argument")
	p.call("GET", base+"/metrics/history", nil, "X-API-Key", p.newTeam()).fails(404, "not_found")
	p.call("DELETE", base, nil).want(204)
	if len(points("")) != 0 {
		t.Error("an ended sandbox has points")
	}
	options, err := redis.ParseURL(p.config.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	kept := redis.NewClient(options)
	defer kept.Close()
	if left := kept.Keys(t.Context(), "wrenn:metrics:*").Val(); len(left) > 0 {
		t.Errorf("left in Redis: %v", left)
	}

	// A window keeps a bounded number of samples, however many are taken.
	h := metrics.New(kept, nil, slog.New(slog.DiscardHandler))
	other, at := uuid.New(), time.Now().Add(-time.Hour)
	for n := range 400 {
		at = at.Add(5 * time.Second)
		if err := h.Record(t.Context(), map[uuid.UUID]metrics.Sample{other: {Time: at, CPU: time.Duration(n) * time.Second, VCPUs: 1}}); err != nil {
			t.Fatal(err)
		}
		if n == 200 { // Another server takes over sampling.
			if err := h.Record(t.Context(), map[uuid.UUID]metrics.Sample{other: {Time: at.Add(time.Millisecond), VCPUs: 1}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, want := range map[string][2]int64{"10m": {121, 121}, "2h": {66, 68}, "24h": {6, 8}} {
		if n := kept.LLen(t.Context(), "wrenn:metrics:"+other.String()+":"+name).Val(); n < want[0] || n > want[1] {
			t.Errorf("%s: %d samples kept, want %v", name, n, want)
		}
	}
}

func TestChannels(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.NotifyPrivate = true
	p.start()
	told := make(chan string, 100)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if err := client.VerifyWebhook(r.Header, body, "0123456789abcdef", time.Minute); err != nil {
			t.Error(err)
		}
		told <- string(body)
	}))
	defer hook.Close()
	body := map[string]any{"name": "ops", "kind": "webhook", "url": hook.URL + "/hunter2", "secret": "0123456789abcdef", "events": []string{"sandbox.started", "host.unreachable"}}
	made := p.call("POST", "/v1/channels", body).want(201)
	base := "/v1/channels/" + made.str("id")
	if made.str("target") != hook.URL || strings.Contains(string(made.Body), "hunter2") || strings.Contains(string(made.Body), "0123456789abcdef") {
		t.Errorf("channel: %s", made.Body)
	}
	if d := p.call("POST", base+"/test", nil).want(200); d.str("state") != "delivered" || d.object()["status"] != 200. {
		t.Errorf("test: %s", d.Body)
	}
	if m := <-told; !strings.Contains(m, `"event":"test"`) {
		t.Errorf("notified %s", m)
	}
	sandbox := p.create(map[string]any{})
	if m := <-told; !strings.Contains(m, sandbox) || !strings.Contains(m, `"event":"sandbox.started"`) {
		t.Errorf("notified %s", m)
	}
	p.eventually("the delivery is listed", func() bool {
		list := p.call("GET", base+"/deliveries", nil).want(200).list("deliveries")
		return len(list) == 2 && list[0].(map[string]any)["state"] == "delivered"
	})
	if next := p.call("GET", base+"/deliveries?limit=1", nil).want(200).str("next_cursor"); len(p.call("GET", base+"/deliveries?cursor="+next, nil).want(200).list("deliveries")) != 1 {
		t.Error("the second page does not have one delivery")
	}
	p.call("GET", base+"/deliveries?cursor=x", nil).fails(400, "invalid_argument")

	other := p.newTeam()
	for _, call := range []string{"GET ", "DELETE ", "GET /deliveries", "POST /test"} {
		method, rest, _ := strings.Cut(call, " ")
		p.call(method, base+rest, nil, "X-API-Key", other).fails(404, "not_found")
	}
	p.call("PATCH", base, map[string]any{"name": "x"}, "X-API-Key", other).fails(404, "not_found")
	p.call("POST", "/v1/channels", body, "X-API-Key", other).fails(403, "permission_denied") // Only the platform's admins may be notified about hosts.
	p.call("POST", "/v1/channels", map[string]any{"name": "n", "kind": "webhook", "url": "ftp://x", "secret": "0123456789abcdef", "events": []string{"sandbox.lost"}}).fails(400, "invalid_argument")
	p.call("POST", "/v1/channels", map[string]any{"name": "n", "kind": "email", "address": "nobody", "events": []string{"sandbox.lost"}}).fails(400, "invalid_argument")
	p.call("POST", "/v1/channels", map[string]any{"name": "n", "kind": "email", "address": "a@example.com", "events": []string{"sandbox.none"}}).fails(400, "invalid_argument")

	changed := p.call("PATCH", base, map[string]any{"enabled": false, "events": []string{"sandbox.lost"}}).want(200).object()
	if changed["enabled"] != false || fmt.Sprint(changed["events"]) != "[sandbox.lost]" || changed["name"] != "ops" {
		t.Errorf("changed: %v", changed)
	}
	if n := len(p.call("GET", "/v1/channels", nil).want(200).list("channels")); n != 1 {
		t.Errorf("%d channels", n)
	}
	if r := p.audit("")["changeChannel"]; r == nil || r["object"] != made.str("id") || r["object_kind"] != "channel" {
		t.Errorf("audit: %v", r)
	}
	p.call("DELETE", base, nil).want(204)
	p.call("GET", base, nil).fails(404, "not_found")
	p.call("GET", "/v1/channels/x", nil).fails(400, "invalid_argument")
}

// TestConfirmChannel confirms a channel like its recipient, on the page that the mail
// links to.
func TestConfirmChannel(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	messages := p.mailed()
	asAda := as(p.bearer(p.person("ada@example.com")))
	p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201)
	body := map[string]any{"name": "c", "kind": "email", "address": "ops@example.com", "events": []string{"sandbox.lost"}}
	made := p.call("POST", "/v1/channels", body, asAda...).want(201)
	if made.object()["confirmed"] != false {
		t.Errorf("created: %v", made.object())
	}
	token := p.linked(messages(), "confirm-channel")
	base := "/v1/channels/" + made.str("id")
	p.call("POST", base+"/test", nil, asAda...).fails(409, "conflict")
	p.call("POST", base+"/confirmation", nil, asAda...).fails(429, "rate_limited")
	page := p.call("GET", "/confirm-channel", nil, nobody...).want(200)
	if html := string(page.Body); strings.Contains(html, "password\"") || !strings.Contains(html, `action="v1/channel-confirmations"`) {
		t.Errorf("page: %s", html)
	}
	p.call("POST", "/v1/channel-confirmations", map[string]any{"token": "wrc_x"}, nobody...).fails(401, "unauthenticated")
	p.call("POST", "/v1/channel-confirmations", map[string]any{"token": token}, nobody...).want(204)
	if got := p.call("GET", base, nil, asAda...).want(200).object(); got["confirmed"] != true {
		t.Errorf("confirmed: %v", got)
	}
	p.call("POST", base+"/confirmation", nil, asAda...).fails(409, "conflict")
	p.call("POST", base+"/confirmation", nil).fails(404, "not_found")
}

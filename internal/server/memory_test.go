package server_test

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
)

// TestOneTeamTakesItsShareOfMemory runs commands with much output for clients that read
// none of it. Their team gets no more than its share of the server's memory, and other
// teams' requests succeed.
func TestOneTeamTakesItsShareOfMemory(t *testing.T) {
	p := newPlane(t)
	p.end()
	p.config.RequestMemoryMiB = 256
	p.start()
	sandbox := p.create(map[string]any{})
	path := "/v1/sandboxes/" + sandbox + "/exec"
	other := p.newTeam()
	foreign := "/v1/sandboxes/" + p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", other).want(201).str("id") + "/exec"

	// Both outputs of 16 MiB fill a share of 64 MiB.
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.http.URL+path, strings.NewReader(`{"cmd":"flood","args":["\u00e9","16777216"]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", adminKey)
	req.Header.Set("Content-Type", "application/json")
	flood, err := http.DefaultClient.Do(req) // returns once the response has begun
	if err != nil {
		t.Fatal(err)
	}
	defer flood.Body.Close()
	if flood.StatusCode != http.StatusOK {
		t.Fatalf("the command that floods: %s", flood.Status)
	}
	long := map[string]any{"cmd": "cat", "stdin": strings.Repeat("x", 100<<10)}
	refused := p.call("POST", path, long)
	refused.fails(429, "rate_limited")
	if refused.Header.Get("Retry-After") == "" {
		t.Error("the response does not say when to retry")
	}
	for who, at := range map[string]string{"the same team's": path, "another team's": foreign} {
		key := adminKey
		if at == foreign {
			key = other
		}
		if got := p.call("POST", at, map[string]any{"cmd": "say", "args": []string{"hello"}}, "X-API-Key", key).want(200).str("stdout"); got != "hello" {
			t.Errorf("%s short command printed %q", who, got)
		}
	}
	if got := p.call("POST", foreign, long, "X-API-Key", other).want(200).str("stdout"); len(got) != 100<<10 {
		t.Errorf("another team's command printed %d bytes", len(got))
	}
	p.call("GET", "/v1/sandboxes", nil).want(200) // requests without such memory succeed
	flood.Body.Close()
	p.eventually("the memory is released", func() bool {
		return p.call("POST", path, long).Status == 200
	})
}

// TestFloodOfControlCharacters checks that output is sent as base64 if JSON would make it
// six times as long.
func TestFloodOfControlCharacters(t *testing.T) {
	p := newPlane(t)
	path := "/v1/sandboxes/" + p.create(map[string]any{}) + "/exec"
	got := p.call("POST", path, map[string]any{"cmd": "flood", "args": []string{"\u0001", "1048576"}}).want(200)
	if got.str("encoding") != "base64" || len(got.Body) > 3<<20 {
		t.Errorf("2 MiB are written as %d bytes of %s", len(got.Body), got.str("encoding"))
	}
}

// TestTeamsOfOneOwnerShareMemory checks that owning several teams gets nobody more of the
// server's memory, and that requests to ports count.
func TestTeamsOfOneOwnerShareMemory(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	type team struct{ key, sandbox string }
	teamOf := func(key string) team {
		t.Helper()
		return team{key, p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201).str("id")}
	}
	ada, bob := p.ownerOf(2, "ada@example.com"), p.ownerOf(1, "bob@example.com")
	one, two, other := teamOf(ada[0]), teamOf(ada[1]), teamOf(bob[0])
	req, err := http.NewRequestWithContext(t.Context(), "POST", p.http.URL+"/v1/sandboxes/"+one.sandbox+"/exec", strings.NewReader(`{"cmd":"flood","args":["\u00e9","16777216"]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", one.key)
	req.Header.Set("Content-Type", "application/json")
	flood, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer flood.Body.Close()
	run := func(of team) response {
		return p.call("POST", "/v1/sandboxes/"+of.sandbox+"/exec", map[string]any{"cmd": "cat", "stdin": strings.Repeat("x", 100<<10)}, "X-API-Key", of.key)
	}
	run(two).fails(429, "rate_limited")
	run(other).want(200)

	// The server keeps the body to be able to send it again.
	held := func() string { return p.metric("wrenn_request_memory_bytes") }
	flood.Body.Close()
	p.eventually("no memory is in use", func() bool { return held() == "0" })
	asked, release := make(chan string, 1), make(chan struct{})
	p.agent.guest = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		asked <- held()
		<-release
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		r, err := http.NewRequest("POST", p.http.URL+"/", strings.NewReader(strings.Repeat("x", 64<<10)))
		if err != nil {
			t.Error(err)
			return
		}
		r.Host = "8000-" + other.sandbox + ".localhost"
		r.Header.Set("X-API-Key", other.key)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Error(err)
			return
		}
		resp.Body.Close()
	}()
	if got := await.Recv(t, "the guest is asked", asked); got != "61440" {
		t.Errorf("%s bytes are in use for a body of 64 KiB", got)
	}
	close(release)
	await.Recv(t, "the request ends", done)
	p.eventually("no memory is in use", func() bool { return held() == "0" })
}

// TestBodiesTakeMemory sends a long body to every operation that takes JSON, while other
// requests use up the memory for requests. Each operation refuses it, says when to retry,
// and releases what it took.
func TestBodiesTakeMemory(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	memory := server.Memory(p.server)
	const all = 256 << 20
	for i := range budget.Share {
		if err := memory.Reserve(fmt.Sprint("somebody ", i)).Grow(all / budget.Share); err != nil {
			t.Fatal(err)
		}
	}
	long := `{"name":"` + strings.Repeat("x", 100<<10) + `"}`
	n := 0
	w.withBodies(func(o operation, c caller) {
		if o.RequestBody.Value.Content.Get("application/json") == nil {
			return
		}
		n++
		_, path, _, headers := w.compose(o, c, targets[0], 0)
		for range 2 {
			r := p.call(o.method, path, strings.NewReader(long), append(headers, "Content-Type", "application/json")...)
			if r.Status != http.StatusTooManyRequests || r.Header.Get("Retry-After") == "" || !strings.Contains(string(r.Body), "memory") {
				t.Errorf("%s as %s: %d %s", o, c.name, r.Status, r.Body)
			}
		}
	})
	if n < 30 {
		t.Errorf("only %d operations take JSON", n)
	}
	p.call("GET", "/v1/sandboxes", nil).want(200)
	p.eventually("the requests' memory is released", func() bool { return memory.Used() == all })
}

// TestUnreadStreamsTakeMemory checks that an unread response, of a port or of a file, counts
// for its owner, and that the server refuses the request if there is no memory for it.
func TestUnreadStreamsTakeMemory(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	p.agent.mu.Lock()
	p.agent.files["/long"] = make([]byte, 64<<10)
	p.agent.mu.Unlock()
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := 64 << 10
		if strings.HasSuffix(r.URL.Path, "/short") {
			n = 1 << 10
		}
		_, _ = w.Write(make([]byte, n))
	})
	port := []string{"Host", "8000-" + sandbox + ".localhost"}
	file := "/v1/sandboxes/" + sandbox + "/files?path=/long"
	for _, r := range []response{p.call("GET", "/long", nil, port...), p.call("GET", file, nil)} {
		if r.want(200); len(r.Body) != 64<<10 {
			t.Errorf("%d bytes came", len(r.Body))
		}
	}
	memory := server.Memory(p.server)
	p.eventually("nothing is held", func() bool { return memory.Used() == 0 })
	for i := range budget.Share {
		if err := memory.Reserve(fmt.Sprint("somebody ", i)).Grow(256 << 20 / budget.Share); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []response{p.call("GET", "/long", nil, port...), p.call("GET", file, nil)} {
		r.fails(429, "rate_limited")
		if r.Header.Get("Retry-After") == "" {
			t.Error("the response does not say when to retry")
		}
	}
	p.call("GET", "/short", nil, port...).want(200)
}

// TestRowsTakeMemory calls every operation that reads while other requests use up the
// memory for requests. An operation whose rows are long is refused and releases what it
// took; one whose rows are short is served.
func TestRowsTakeMemory(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	memory := server.Memory(p.server)
	const all = 256 << 20
	fill := func() (empty func()) {
		var held []*budget.Reservation
		for i := range budget.Share {
			h := memory.Reserve(fmt.Sprint("somebody ", i))
			if err := h.Grow(all / budget.Share); err != nil {
				t.Fatal(err)
			}
			held = append(held, h)
		}
		return func() {
			for _, h := range held {
				h.Release()
			}
		}
	}
	people := callers()
	reads := func(f func(o operation, c caller, n int)) {
		for n, o := range operations(t) {
			for _, c := range people {
				if o.method == http.MethodGet && !o.changing() && !c.dead && o.expected(c, targets[0]) == 0 {
					f(o, c, n)
					break
				}
			}
		}
	}
	want := make(map[string]int)
	reads(func(o operation, c caller, n int) {
		if r := w.send(o, c, targets[0], n); len(r.Body) <= budget.Free { // not a long page
			want[o.String()] = r.Status
		}
	})
	empty := fill()
	reads(func(o operation, c caller, n int) {
		if status := want[o.String()]; status == 0 {
			return
		} else if r := w.send(o, c, targets[0], n); r.Status != status {
			t.Errorf("%s, with short rows: %d %s, want %d", o, r.Status, r.Body, status)
		}
	})
	if len(want) < 30 {
		t.Errorf("only %d operations read", len(want))
	}

	of := w.teams[ours]
	w.sql("UPDATE sandboxes SET metadata = (SELECT jsonb_object_agg('k' || n, repeat('x', 500)) FROM generate_series(1, 60) n) WHERE id = $1", of.sandbox)
	w.sql("UPDATE builds SET recipe = repeat('x', 100000) WHERE id = $1", of.build)
	w.sql(`INSERT INTO build_steps SELECT $1, n, jsonb_build_object('number', n, 'phase', 'recipe', 'text', 'RUN', 'state', 'succeeded', 'output', repeat(E'\x01', 10000)) FROM generate_series(1, 10) n`, of.build)
	w.sql(`INSERT INTO deliveries (id, channel_id, event, body, state) SELECT gen_random_uuid(), $1, 'test', jsonb_build_object('k', repeat('x', 1000)), 'failed' FROM generate_series(1, 50) n`, of.channel)
	w.sql(`INSERT INTO audit_records (id, at, team_id, actor, action, object, object_id, address, request_id, result, code)
		SELECT gen_random_uuid(), now(), $1, 'platform', repeat('x', 200), '', '', '', '', 'ok', '' FROM generate_series(1, 100) n`, of.id)
	long := map[string]bool{
		"listSandboxes": true, "getSandbox": true, "getBuild": true, "followBuild": true, "listDeliveries": true, "listAudit": true,
		"listBuilds": false, // has no recipes
	}
	check := func(when string, refused bool) {
		t.Helper()
		reads(func(o operation, c caller, n int) {
			is, checked := long[o.OperationID]
			if !checked {
				return
			}
			status := http.StatusOK
			if is && refused {
				status = http.StatusTooManyRequests
			}
			if r := w.send(o, c, targets[0], n); r.Status != status || status != http.StatusOK && r.Header.Get("Retry-After") == "" {
				t.Errorf("%s, %s: %d %.200s", when, o, r.Status, r.Body)
			}
		})
	}
	check("without memory", true)
	empty()
	check("with memory", false)
	p.eventually("the requests' memory is released", func() bool { return memory.Used() == 0 })
}

// TestExportTakesPages exports audit records that are longer than all rows that an owner's
// requests may have in memory. Each page takes memory only until it is written.
func TestExportTakesPages(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	const records = 10_000 // of 2000 bytes, for which rows take four times as much
	p.sql(`INSERT INTO audit_records (id, at, team_id, actor, action, object, object_id, address, request_id, result, code)
		SELECT gen_random_uuid(), now(), team_id, 'platform', repeat('x', 2000), '', '', '', '', 'ok', '' FROM api_keys, generate_series(1, $1::integer)`, records)
	for _, format := range []string{"ndjson", "csv"} {
		body := p.call("GET", "/v1/audit?format="+format, nil).want(200).Body
		if n := bytes.Count(body, []byte("\n")); n < records {
			t.Errorf("%s: %d lines were exported, want %d", format, n, records)
		}
	}
	memory := server.Memory(p.server)
	p.eventually("the export's memory is released", func() bool { return memory.Used() == 0 })
}

package notify

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

// schema returns a connection to a database with an empty schema.
func schema(t *testing.T) *pgx.Conn {
	t.Helper()
	return pgtest.Connect(t, storetest.New(t))
}

// documented returns the values of a schema of the API document, sorted.
func documented(t *testing.T, name string) (values []string) {
	t.Helper()
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range spec.Components.Schemas[name].Value.Enum {
		values = append(values, v.(string))
	}
	slices.Sort(values)
	return values
}

var literal = regexp.MustCompile(`'([^']*)'`)

func literals(sql string) (all []string) {
	for _, m := range literal.FindAllStringSubmatch(sql, -1) {
		all = append(all, m[1])
	}
	return all
}

// TestKinds checks that the database and the API document have the kinds of channels that
// messages are made for. TestDocument in client compares the client and the command line.
func TestKinds(t *testing.T) {
	want := slices.Sorted(slices.Values(kinds))
	var check string
	if err := schema(t).QueryRow(t.Context(), "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'channels_kind_check'").Scan(&check); err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(slices.Values(literals(check))); !slices.Equal(got, want) {
		t.Errorf("the table channels allows %q, want %q", got, want)
	}
	if got := documented(t, "ChannelKind"); !slices.Equal(got, want) {
		t.Errorf("the API document has %q, want %q", got, want)
	}
	if err := (&Service{}).check("pigeon", target{URL: "https://example.com"}); err == nil {
		t.Error("an unknown kind is allowed")
	}
}

var (
	// told matches the event that a trigger sends.
	told = regexp.MustCompile(`notify_channels\([^,]+, ([^,]+),`)
	// cases matches how a trigger chooses the event.
	cases = regexp.MustCompile(`(?s)\bevent := CASE(.*?)END;`)
	// statuses matches the statuses of hosts that are events.
	statuses = regexp.MustCompile(`NEW\.status NOT IN \(([^)]*)\)`)
)

// TestEvents checks that the API document has exactly the events that triggers and the
// service send, and that each has a text.
func TestEvents(t *testing.T) {
	sent := map[string]bool{QuotaReached: true}
	rows, err := schema(t).Query(t.Context(), "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosrc LIKE '%notify_channels(%'")
	if err != nil {
		t.Fatal(err)
	}
	var name, body string
	if _, err := pgx.ForEachRow(rows, []any{&name, &body}, func() error {
		for _, m := range told.FindAllStringSubmatch(body, -1) {
			var events []string
			switch event := m[1]; {
			case event == "event":
				for _, s := range literals(cases.FindString(body)) {
					if strings.Contains(s, ".") { // the others are states and conditions
						events = append(events, s)
					}
				}
			case event == "'"+platformPrefix+"' || NEW.status":
				if m := statuses.FindStringSubmatch(body); m != nil {
					for _, s := range literals(m[1]) {
						events = append(events, platformPrefix+s)
					}
				}
			default:
				events = literals(event)
			}
			if len(events) == 0 {
				t.Errorf("%s sends %s, which this test does not understand", name, m[1])
			}
			for _, e := range events {
				sent[e] = true
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := documented(t, "ChannelEvent")
	if got := slices.Sorted(maps.Keys(sent)); !slices.Equal(got, want) {
		t.Errorf("events are %q, and the API document has %q", got, want)
	}
	for _, e := range append(want, TestEvent) {
		if text := (Message{Event: e}).text(); strings.HasPrefix(text, "Sandbox ") != strings.HasPrefix(e, "sandbox.") {
			t.Errorf("the text of %s is %q", e, text)
		}
	}
}

package rest

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		`{"a":5.0,"b":5e0,"c":1.5,"d":-0.0,"e":1E3,"f":[ 1 , true , null ]}`: `{"a":5,"b":5,"c":1.5,"d":0,"e":1000,"f":[1,true,null]}`,
		`"é"`:                  `"é"`,
		` {} `:                 `{}`,
		`9007199254740993`:     `9007199254740993`,
		`{"x":"\u0041"}`:       `{"x":"A"}`,
		`{"bytes":"a\u0000b"}`: `{"bytes":"a\u0000b"}`,
		strings.Repeat("[", 64) + strings.Repeat("]", 64): strings.Repeat("[", 64) + strings.Repeat("]", 64),
	} {
		got, _, err := canonical([]byte(in), []jsontext.Pointer{"/bytes"})
		if err != nil || string(got) != want {
			t.Errorf("%s: %s %v, want %s", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		``:                          "JSON: malformed",
		`{`:                         "JSON: malformed",
		`{"a":1,}`:                  "JSON: malformed",
		`{}{}`:                      "JSON: unexpected data after the value",
		`1 2`:                       "JSON: unexpected data after the value",
		`{} x`:                      "JSON: malformed",
		`{"a":1,"a":2}`:             "a: given more than once",
		`{"m":{"a":1,"b":2,"a":3}}`: "m.a: given more than once",
		`{"a":1,"\u0061":2}`:        "a: given more than once",
		`{"a":"x\u0000"}`:           "a: must be UTF-8 without NUL",
		`{"a\u0000":1}`:             "a\uFFFD: must be UTF-8 without NUL",
		`{"m":{"bytes":"\u0000"}}`:  "m.bytes: must be UTF-8 without NUL",
		"{\"a\":\"\xff\"}":          "JSON: malformed",
		`{"a":"\ud800"}`:            "JSON: malformed",
		`{"a":1e999}`:               "a: number out of range",
		"[" + strings.Repeat("0,", maxValues) + "0]": "JSON: more than 65536 values",
		strings.Repeat("[", 65) + "]":                "JSON: nested more than 64 levels deep",
	} {
		_, _, err := canonical([]byte(in), []jsontext.Pointer{"/bytes"})
		var f *fault.Error
		if !errors.As(err, &f) || f.Code != fault.InvalidArgument || f.Message != want {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
}

// TestBodies checks that the decoder accepts what the document accepts, and that refusals
// are in plain words.
func TestBodies(t *testing.T) {
	a := newAPI(t)
	for _, tt := range []struct {
		op, body, wrong string
		into            any
	}{
		{"createSandbox", `{"vcpus":2.0,"memory_mib":1.024e3,"timeout_seconds":0}`, "", &rest.CreateSandbox{}},
		{"createSandbox", `{"vcpus":1.5}`, "vcpus: ", nil},
		{"createSandbox", `{"vcpus":1e30}`, "vcpus: ", nil},
		{"createSandbox", `{"metadata":{"a":"1"},"metadata":{"b":"2"}}`, "metadata: given more than once", nil},
		{"createSandbox", `{"Vcpus":1}`, "", nil},
		{"createSandbox", `{} {}`, "JSON: unexpected data", nil},
		{"createSandbox", `[]`, "JSON: ", nil},
		{"createSandbox", `null`, "JSON: ", nil},
		{"createKey", `{"name":"x","expires_at":"2030-02-28T00:00:00Z"}`, "", &rest.NewKey{}},
		{"createKey", `{"name":"x","expires_at":"2030-02-30T00:00:00Z"}`, "expires_at: ", nil},
		{"createKey", `{"name":"x","expires_at":"2030-02-28T23:59:60Z"}`, "expires_at: ", nil},
		{"setSettings", `{"signup_open":true,"default_quota":{"max_running":1},"default_quota":{"max_running":"x"}}`, "default_quota: given more than once", nil},
		{"exec", `{"cmd":"cat","stdin":"\u0000"}`, "", &rest.ExecRequest{}},
		{"exec", `{"cmd":"c\u0000at"}`, "cmd: must be UTF-8 without NUL", nil},
	} {
		b, err := conform(bodySchema(operation(t, a, tt.op)), []byte(tt.body), budget.New(1<<30).Reserve(""))
		if tt.into == nil {
			var f *fault.Error
			if !errors.As(err, &f) || !strings.HasPrefix(f.Message, tt.wrong) || strings.Contains(f.Message, "rest.") || strings.Contains(f.Message, "Go ") {
				t.Errorf("%s %s: %v, want %q", tt.op, tt.body, err, tt.wrong)
			}
			continue
		}
		if err == nil {
			err = unmarshal(b, tt.into)
		}
		if err != nil {
			t.Errorf("%s %s: %v", tt.op, tt.body, err)
		}
	}
}

// TestBodiesAreClosed checks that objects in bodies have only the document's members: the
// decoder would accept "Name" for "name", which the validator would pass as an unknown
// member.
func TestBodiesAreClosed(t *testing.T) {
	a := newAPI(t)
	seen := make(map[*openapi3.Schema]bool)
	var closed func(where string, ref *openapi3.SchemaRef)
	closed = func(where string, ref *openapi3.SchemaRef) {
		if ref == nil || seen[ref.Value] {
			return
		}
		s := ref.Value
		seen[s] = true
		if more := s.AdditionalProperties.Has; len(s.Properties) > 0 && (more == nil || *more) {
			t.Errorf("%s accepts more than its properties", where)
		}
		for name, p := range s.Properties {
			closed(where+"."+name, p)
		}
		closed(where+"[]", s.Items)
		closed(where+".*", s.AdditionalProperties.Schema)
		for _, part := range slices.Concat(s.AllOf, s.AnyOf, s.OneOf) {
			closed(where, part)
		}
	}
	for _, item := range a.spec.Paths.Map() {
		for _, op := range item.Operations() {
			if s := bodySchema(op); s != nil {
				closed(op.OperationID, &openapi3.SchemaRef{Value: s})
			}
		}
	}
	for _, message := range []string{"ExecStreamStart", "ExecStreamControl"} {
		closed(message, a.spec.Components.Schemas[message])
	}
	if len(seen) < 50 {
		t.Errorf("only %d schemas", len(seen))
	}
}

// operation returns the document's operation with an id.
func operation(t *testing.T, a *API, id string) *openapi3.Operation {
	t.Helper()
	for _, item := range a.spec.Paths.Map() {
		for _, op := range item.Operations() {
			if op.OperationID == id {
				return op
			}
		}
	}
	t.Fatalf("no operation %s", id)
	return nil
}

func TestReadBody(t *testing.T) {
	a := newAPI(t)
	for _, tt := range []struct {
		name, op, kind, body, want string
	}{
		{"", "createTeam", "application/json", `{"name":"x"}`, ""},
		{"charset", "createTeam", "application/json; charset=utf-8", `{"name":"x"}`, ""},
		{"capitals", "createTeam", "Application/JSON", `{"name":"x"}`, ""},
		{"form", "createTeam", "application/x-www-form-urlencoded", `{"name":"x"}`, "Content-Type: must be application/json"},
		{"no type", "createTeam", "", `{"name":"x"}`, "Content-Type: must be application/json"},
		{"none", "createTeam", "application/json", "", "body: missing"},
		{"none where none must be", "logOut", "", "", ""},
		{"field", "createTeam", "application/json", `{}`, "name: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest("POST", "/", strings.NewReader(tt.body))
			r.Header.Set("Content-Type", tt.kind)
			err := readBody(r, operation(t, a, tt.op), budget.New(1<<20).Reserve(""))
			var f *fault.Error
			if tt.want == "" && err != nil || tt.want != "" && (!errors.As(err, &f) || !strings.HasPrefix(f.Message, tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	r := httptest.NewRequest("POST", "/", iotest.ErrReader(io.ErrUnexpectedEOF))
	if err := readBody(r, operation(t, a, "createTeam"), budget.New(1<<20).Reserve("")); !fault.Is(err, fault.InvalidArgument) {
		t.Errorf("a body that breaks off: %v", err)
	}
}

// TestRefusalsAreShort checks that a refusal, which is logged, does not contain the
// refused value.
func TestRefusalsAreShort(t *testing.T) {
	a := newAPI(t)
	long := "secret" + strings.Repeat("x", 1<<20)
	for _, body := range []string{`{"cmd":"x","cwd":"` + long + `"}`, `{"cmd":["` + long + `"]}`, `{"` + long + `":1,"cmd":"x"}`, `{"envs":{"` + long + `":1},"cmd":"x"}`} {
		r := httptest.NewRequest("POST", "/", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		err := readBody(r, operation(t, a, "exec"), budget.New(1<<40).Reserve(""))
		if !fault.Is(err, fault.InvalidArgument) {
			t.Fatalf("%.40s: %.200v", body, err)
		}
		text := err.Error()
		if len(text) > 1000 || strings.HasPrefix(body, `{"cmd"`) && strings.Contains(text, "secret") {
			t.Errorf("%.40s: the log has %d bytes: %.1000s", body, len(text), text)
		}
	}
}

// TestReadBodyTakesMemory checks that a body's memory is reserved before it is read.
func TestReadBodyTakesMemory(t *testing.T) {
	a := newAPI(t)
	memory := budget.New(4 << 20)
	held := memory.Reserve("a team")
	body := func(n int) *http.Request {
		r := httptest.NewRequest("POST", "/", strings.NewReader(`{"cmd":"cat","stdin":"`+strings.Repeat("x", n)+`"}`))
		r.Header.Set("Content-Type", "application/json")
		return r
	}
	if err := readBody(body(100<<10), operation(t, a, "exec"), held); err != nil || memory.Used() < bodyCost*100<<10 {
		t.Errorf("%v, %d bytes are reserved", err, memory.Used())
	}
	if err := readBody(body(1<<20), operation(t, a, "exec"), held); !fault.Is(err, fault.RateLimited) {
		t.Errorf("a body without room: %v", err)
	}
	held.Release()
	// Many short values take more memory than their bytes.
	many := httptest.NewRequest("POST", "/", strings.NewReader(`{"cmd":"x","args":["a"`+strings.Repeat(`,"a"`, 9999)+`]}`))
	many.Header.Set("Content-Type", "application/json")
	if err := readBody(many, operation(t, a, "exec"), held); !fault.Is(err, fault.RateLimited) {
		t.Errorf("a body of 10,000 values with room for 4,000: %v", err)
	}
	held.Release()
	if memory.Used() != 0 {
		t.Errorf("%d bytes are still reserved", memory.Used())
	}
}

// TestGuestsJSONTakesMemory checks that memory for a guest's values is reserved before
// they are decoded.
func TestGuestsJSONTakesMemory(t *testing.T) {
	memory := budget.New(4 << 20)
	held := memory.Reserve("a team")
	for what, line := range map[string]string{
		"a tree":  `{"type":"result","json":[` + strings.Repeat("[],", 9999) + `0]}`,
		"results": strings.Repeat(`{"type":"result"}`, 4000),
	} {
		if _, err := collectCode(strings.NewReader(line+`{"type":"end_of_execution"}`), held); !fault.Is(err, fault.RateLimited) {
			t.Errorf("%s: %v", what, err)
		}
		held.Release()
	}
	if err := decodeGuest([]byte(`[`+strings.Repeat("{},", 9999)+`{}]`), held, &[]map[string]any{}); !fault.Is(err, fault.RateLimited) {
		t.Errorf("contexts: %v", err)
	}
}

// FuzzCanonical checks that an accepted body has one meaning: its canonical form is
// accepted unchanged, and decodes to the same value.
func FuzzCanonical(f *testing.F) {
	for _, s := range []string{`{"a":5.0,"b":[1e3,-0.0]}`, `{"a":1,"a":2}`, `"\ud83d\ude00"`, `{} {}`, "1e308"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		b, _, err := canonical([]byte(s), nil)
		if err != nil {
			return
		}
		again, _, err := canonical(b, nil)
		if err != nil || string(again) != string(b) {
			t.Fatalf("%q becomes %q, and that %q, %v", s, b, again, err)
		}
		var was, is any
		if err := errors.Join(json.Unmarshal([]byte(s), &was), json.Unmarshal(b, &is)); err != nil || !reflect.DeepEqual(was, is) {
			t.Fatalf("%q is %v, %q is %v: %v", s, was, b, is, err)
		}
	})
}

package rest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/linear"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
)

// TestWriteResult checks that clients decode exactly what the command printed, in either
// encoding.
func TestWriteResult(t *testing.T) {
	long := strings.Repeat("größer <als> \"ein\" Stück\t\n", 40<<10)
	for name, tt := range map[string]struct {
		stdout, stderr string
		encoding       rest.Encoding
	}{
		"none":           {"", "", rest.UTF8},
		"text":           {"42\n", "größer", rest.UTF8},
		"colours":        {"\x1b[31mred\x1b[0m", "\x00", rest.UTF8},
		"long":           {long, long[1:], rest.UTF8},
		"bytes":          {"\xff\xfe", "text", rest.Base64},
		"NUL":            {strings.Repeat("\x00", 1<<20), "", rest.Base64},
		"piece's end":    {strings.Repeat("x", chunk-1) + "größer", "", rest.UTF8},
		"a rune's bytes": {"gr\xc3", "\xb6", rest.Base64},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			out := &hostagentv1.ExecResponse{Stdout: []byte(tt.stdout), Stderr: []byte(tt.stderr), ExitCode: 3, Error: "signal: killed", TimedOut: true, Truncated: true}
			if err := writeResult(w, out, 5*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			body := w.Body.String()
			if len(body) > 2*(len(tt.stdout)+len(tt.stderr))+300 {
				t.Errorf("%d bytes are written as %d", len(tt.stdout)+len(tt.stderr), len(body))
			}
			d := json.NewDecoder(w.Body)
			d.DisallowUnknownFields()
			var got rest.ExecResult
			if err := d.Decode(&got); err != nil {
				t.Fatal(err)
			}
			killed := "signal: killed"
			want := rest.ExecResult{Stdout: tt.stdout, Stderr: tt.stderr, Encoding: tt.encoding, ExitCode: 3, Error: &killed, TimedOut: true, Truncated: true, DurationMs: 5}
			if tt.encoding == rest.Base64 {
				want.Stdout, want.Stderr = base64.StdEncoding.EncodeToString([]byte(tt.stdout)), base64.StdEncoding.EncodeToString([]byte(tt.stderr))
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %.300v, want %.300v", got, want)
			}
		})
	}
}

// TestLinear checks that encoding takes memory in proportion to the input.
func TestLinear(t *testing.T) {
	linear.Check(t, "collectCode", 2000, func(n int) {
		var lines strings.Builder
		for range n {
			lines.WriteString(`{"type":"stdout","text":"0123456789"}` + "\n" + `{"type":"result","text":"1"}` + "\n")
		}
		fmt.Fprintf(&lines, `{"type":%q}`, endOfExecution)
		if r, err := collectCode(strings.NewReader(lines.String()), budget.New(1<<40).Reserve("")); err != nil || len(r.Stdout) != 10*n {
			t.Errorf("%d bytes, %v", len(r.Stdout), err)
		}
	})
	linear.Check(t, "canonical", 2000, func(n int) {
		if _, _, err := canonical([]byte("["+strings.Repeat(`{"a":1},`, n)+"0]"), nil); err != nil {
			t.Error(err)
		}
	})
	a := newAPI(t)
	linear.Check(t, "readBody", 1000, func(n int) {
		r := httptest.NewRequest("POST", "/", strings.NewReader(`{"cmd":"x","args":["a"`+strings.Repeat(`,"a"`, n)+`],"envs":{"a":"`+strings.Repeat("x", 16*n)+`"}}`))
		r.Header.Set("Content-Type", "application/json")
		if err := readBody(r, operation(t, a, "exec"), budget.New(1<<40).Reserve("")); err != nil {
			t.Error(err)
		}
	})
	linear.Check(t, "writeText", 1<<20, func(n int) {
		if err := writeText(io.Discard, make([]byte, n)); err != nil {
			t.Error(err)
		}
	})
}

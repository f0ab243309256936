package rest

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
)

// shortOutput is the size in bytes up to which valid text is written as text, for people
// to read. Longer output uses the shorter encoding.
const shortOutput = 64 << 10

// writeResult responds with a command's result. It writes the output piece by piece,
// because a control character becomes six bytes of JSON.
func writeResult(w http.ResponseWriter, out *hostagentv1.ExecResponse, took time.Duration) error {
	result := rest.ExecResult{
		Encoding: rest.UTF8, ExitCode: out.ExitCode, Error: some(out.Error), TimedOut: out.TimedOut, Truncated: out.Truncated,
		DurationMs: took.Milliseconds(),
	}
	write := writeText
	if !textual(out.Stdout, out.Stderr) {
		result.Encoding, write = rest.Base64, writeBase64
	}
	// All members except the two long ones, which are written without a copy.
	others, err := json.Marshal(struct {
		rest.ExecResult
		Stdout *struct{} `json:"stdout,omitempty"`
		Stderr *struct{} `json:"stderr,omitempty"`
	}{ExecResult: result})
	if err != nil {
		return err
	}
	defer allow(w, 2*(len(out.Stdout)+len(out.Stderr)))()
	w.Header().Set("Content-Type", jsonType)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	for _, long := range []struct {
		before string
		bytes  []byte
	}{{`{"stdout":"`, out.Stdout}, {`","stderr":"`, out.Stderr}} {
		if _, err := io.WriteString(w, long.before); err != nil {
			return err
		}
		if err := write(w, long.bytes); err != nil {
			return err
		}
	}
	_, err = w.Write(append(append([]byte(`",`), others[1:]...), '\n'))
	return err
}

// A client that does not read its response would hold the response's memory. It has
// readWithin, plus time for long ones.
const (
	readWithin = 30 * time.Second
	readRate   = 256 << 10 // bytes a second
)

// allow sets the deadline for a client to read a response of size bytes. done removes it.
func allow(w http.ResponseWriter, size int) (done func()) {
	c := http.NewResponseController(w)
	// Deadlines are only unsupported in tests, which have no connection.
	_ = c.SetWriteDeadline(time.Now().Add(readWithin + time.Duration(size/readRate)*time.Second))
	return func() { _ = c.SetWriteDeadline(time.Time{}) }
}

// textual reports whether outputs are written as text.
func textual(all ...[]byte) bool {
	size, escaped := 0, 0
	for _, b := range all {
		if !utf8.Valid(b) {
			return false
		}
		for _, c := range b {
			if c < ' ' && c != '\n' && c != '\t' && c != '\r' {
				escaped++
			}
		}
		size += len(b)
	}
	return size <= shortOutput || size+5*escaped <= base64.StdEncoding.EncodedLen(size)
}

func writeBase64(w io.Writer, b []byte) error {
	enc := base64.NewEncoder(base64.StdEncoding, w)
	if _, err := enc.Write(b); err != nil {
		return err
	}
	return enc.Close()
}

// writeText writes the content of a JSON string, without the quotes.
func writeText(w io.Writer, b []byte) error {
	var quoted []byte
	for len(b) > 0 {
		n := min(len(b), chunk)
		for n < len(b) && !utf8.RuneStart(b[n]) {
			n--
		}
		var err error
		if quoted, err = jsontext.AppendQuote(quoted[:0], b[:n]); err != nil {
			return err
		}
		if _, err := w.Write(quoted[1 : len(quoted)-1]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

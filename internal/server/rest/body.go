package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// maxDepth bounds the nesting of a JSON body.
const maxDepth = 64

// maxValues bounds the values and member names of a JSON body. Each takes some hundred
// bytes of memory, however short it is.
const maxValues = 1 << 16

// bodyCost is the memory per byte of a JSON body: the body, its canonical form, and the
// strings of both.
const bodyCost = 4

// valueCost is the memory of a value or a name beside its bytes. The first freeValues are
// free.
const (
	valueCost  = 256
	freeValues = 64
)

// maxExact is the largest integer that all JSON implementations represent exactly.
const maxExact = 1<<53 - 1

// maxPlace bounds the path in an error, in bytes.
const maxPlace = 200

const jsonType = "application/json"

func init() {
	// Make the validator accept the same times as the decoder.
	openapi3.DefineStringFormatValidator("date-time", openapi3.NewCallbackValidator(func(s string) error {
		_, err := time.Parse(time.RFC3339, s)
		return err
	}))
}

// canonical returns the JSON value in b with all integers as plain digits. It refuses
// what parsers read differently: duplicate members, data after the value, and strings
// that are not text. bytesIn points (RFC 6901) to strings that may contain NUL. values
// counts what [maxValues] bounds.
func canonical(b []byte, bytesIn []jsontext.Pointer) (_ []byte, values int, _ error) {
	var out bytes.Buffer
	out.Grow(len(b))
	dec, enc := jsontext.NewDecoder(bytes.NewBuffer(b)), jsontext.NewEncoder(&out)
	for whole := false; ; whole, values = dec.StackDepth() == 0, values+1 {
		token, err := dec.ReadToken()
		if errors.Is(err, io.EOF) && whole {
			return bytes.TrimSuffix(out.Bytes(), []byte("\n")), values, nil
		}
		if err != nil {
			return nil, 0, malformed(err)
		}
		if dec.StackDepth() > maxDepth {
			return nil, 0, fault.New(fault.InvalidArgument, "JSON: nested more than %d levels deep", maxDepth)
		}
		if values > maxValues {
			return nil, 0, fault.New(fault.InvalidArgument, "JSON: more than %d values", maxValues)
		}
		if whole {
			return nil, 0, fault.New(fault.InvalidArgument, "JSON: unexpected data after the value")
		}
		switch token.Kind() {
		case '"':
			if strings.Contains(token.String(), "\x00") && !slices.Contains(bytesIn, dec.StackPointer()) {
				return nil, 0, notText(place(dec.StackPointer()))
			}
		case '0':
			if token, err = number(token); err != nil {
				return nil, 0, fault.Because(err, fault.InvalidArgument, "%.200s: number out of range", place(dec.StackPointer()))
			}
		}
		if err := enc.WriteToken(token); err != nil {
			return nil, 0, malformed(err)
		}
	}
}

// number writes integers as plain digits: 5.0 and 5e0 become 5.
func number(token jsontext.Token) (jsontext.Token, error) {
	digits := token.String()
	f, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return token, err
	}
	if strings.ContainsAny(digits, ".eE") && f == math.Trunc(f) && math.Abs(f) <= maxExact {
		return jsontext.Int(int64(f)), nil
	}
	return token, nil
}

// malformed converts a syntax error for the caller.
func malformed(err error) error {
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) && errors.Is(err, jsontext.ErrDuplicateName) {
		return fault.Because(err, fault.InvalidArgument, "%.200s: given more than once", place(syntax.JSONPointer))
	}
	return fault.Because(err, fault.InvalidArgument, "JSON: malformed")
}

// place returns the path of a value in a body, such as "a.b".
func place(p jsontext.Pointer) string {
	parts := slices.Collect(p.Tokens())
	if len(parts) == 0 {
		return "JSON"
	}
	return text.Clean(strings.Join(parts, "."), maxPlace)
}

// bodySchema returns the schema of an operation's JSON body; nil if it has none.
func bodySchema(op *openapi3.Operation) *openapi3.Schema {
	if op.RequestBody == nil {
		return nil
	}
	media := op.RequestBody.Value.Content[jsonType]
	if media == nil {
		return nil
	}
	return media.Schema.Value
}

// binary returns the members of an object that carry bytes rather than text.
func binary(s *openapi3.Schema) (all []jsontext.Pointer) {
	for name, p := range s.Properties {
		if is, _ := p.Value.Extensions["x-wrenn-bytes"].(bool); is {
			all = append(all, jsontext.Pointer("").AppendToken(name))
		}
	}
	return all
}

// growForValues takes the memory of n values and names beside their bytes.
func growForValues(held *budget.Reservation, n int) error {
	return held.Grow(valueCost * int64(max(0, n-freeValues)))
}

// conform checks JSON against a schema and returns it in canonical form, so that callers
// decode exactly what was checked. It takes the memory of the values before it creates
// them.
func conform(s *openapi3.Schema, b []byte, held *budget.Reservation) ([]byte, error) {
	b, values, err := canonical(b, binary(s))
	if err != nil {
		return nil, err
	}
	if err := growForValues(held, values); err != nil {
		return nil, err
	}
	var value any
	if err := json.Unmarshal(b, &value); err != nil {
		return nil, malformed(err)
	}
	if err := s.VisitJSON(value, openapi3.VisitAsRequest()); err != nil {
		return nil, invalid(err)
	}
	return b, nil
}

// readBody checks a request's JSON body and replaces it with its canonical form for
// [decode]. It takes the memory from held.
func readBody(r *http.Request, op *openapi3.Operation, held *budget.Reservation) error {
	s := bodySchema(op)
	if s == nil {
		return nil
	}
	b, err := io.ReadAll(held.Reader(r.Body, bodyCost))
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &long):
		return long
	case fault.Is(err, fault.RateLimited):
		return err
	case err != nil:
		return fault.Body(err)
	case len(b) == 0 && op.RequestBody.Value.Required:
		return fault.New(fault.InvalidArgument, "body: missing")
	case len(b) == 0:
		r.Body = http.NoBody
		return nil
	}
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != jsonType {
		return fault.New(fault.InvalidArgument, "Content-Type: must be %s", jsonType)
	}
	if b, err = conform(s, b, held); err != nil {
		return err
	}
	r.Body = &checked{Reader: bytes.NewReader(b), json: b}
	return nil
}

// checked is a body that conforms to its schema.
type checked struct {
	*bytes.Reader
	json []byte
}

// Close does nothing: the HTTP server closes the original body.
func (*checked) Close() error { return nil }

// decode decodes a checked JSON body. Without a body, it leaves v unchanged.
func decode(r *http.Request, v any) error {
	if r.Body == http.NoBody {
		return nil
	}
	body, ok := r.Body.(*checked)
	if !ok {
		return fault.New(fault.Internal, "internal error") // The operation declares no JSON body.
	}
	return unmarshal(body.json, v)
}

// unmarshal decodes JSON that conforms to v's schema. A failure is a bug: the schema and
// v differ.
func unmarshal(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fault.Because(err, fault.Internal, "internal error")
	}
	return nil
}

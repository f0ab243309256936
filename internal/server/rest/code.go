package rest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// gatewayPort is the port of a sandbox's code interpreter.
	gatewayPort = 49999
	// maxCodeOutput bounds the output of code that is not streamed, in bytes of JSON.
	maxCodeOutput = 32 << 20
	// codeCost is the memory per byte of it: in its line, decoded, joined and encoded
	// again.
	codeCost = 4
	// encodeCost is the memory per byte of code on its way to the guest.
	encodeCost = 3
	// resultCost is the memory of a result beside its bytes.
	resultCost = 512
	// defaultContext is the context of code that names none.
	defaultContext = "default"
	// defaultCodeTimeout is the default time limit of code in seconds.
	defaultCodeTimeout = 300
)

// gateway calls the code interpreter of the caller's sandbox. It returns only successful
// responses. Their body comes from the guest and may be hostile.
func (a *API) gateway(r *http.Request, sandbox, method, path string, body any) (*http.Response, error) {
	u, err := sandboxID(sandbox)
	if err != nil {
		return nil, err
	}
	var b []byte
	if body != nil {
		if b, err = encode(body); err != nil {
			return nil, err
		}
	}
	resp, err := a.Sandboxes.Port(r.Context(), caller(r).Team, u, gatewayPort, method, path, b)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var said struct {
		Message string `json:"message"`
	}
	_ = json.NewDecoder(io.LimitReader(resp.Body, 4<<10)).Decode(&said)
	switch {
	case resp.StatusCode == http.StatusNotFound && said.Message != "":
		return nil, fault.New(fault.NotFound, "%.300s", said.Message)
	case resp.StatusCode == http.StatusBadRequest && said.Message != "":
		return nil, fault.New(fault.InvalidArgument, "%.300s", said.Message)
	case resp.StatusCode == http.StatusConflict && said.Message != "":
		return nil, fault.New(fault.Conflict, "%.300s", said.Message)
	}
	return nil, fault.New(fault.Conflict, "no code interpreter responds on port %d of the sandbox: does it have the template code-interpreter?", gatewayPort)
}

// encode returns JSON without HTML escapes, so that code does not grow much.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return b.Bytes(), err
}

// RunCode answers POST /v1/sandboxes/{sandbox_id}/code.
func (a *API) RunCode(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	var req rest.RunCode
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	held := observed(r).held
	if err := held.GrowFor(len(req.Code), encodeCost); err != nil {
		a.Fail(w, r, err)
		return
	}
	resp, err := a.gateway(r, sandbox, http.MethodPost, "/execute", map[string]any{
		"code": req.Code, "context_id": or(req.ContextID, defaultContext), "env_vars": or(req.Envs, nil), "timeout": or(req.TimeoutSeconds, defaultCodeTimeout),
	})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	defer resp.Body.Close()
	if !or(req.Stream, false) {
		result, err := collectCode(resp.Body, held)
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		defer allow(w, maxCodeOutput)()
		answer(w, http.StatusOK, result)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w)
	buf := make([]byte, chunk)
	for {
		_ = flush.Flush()
		n, err := resp.Body.Read(buf)
		if _, e := w.Write(buf[:n]); e != nil || errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // so that the client does not take a part for the whole
		}
	}
}

// codeEvent is one line of a code interpreter's response.
type codeEvent struct {
	rest.CodeOutput
	Type           string `json:"type"`
	Name           string `json:"name"`
	Value          string `json:"value"`
	Traceback      string `json:"traceback"`
	ExecutionCount int32  `json:"execution_count"`
}

// endOfExecution is the type of the last line.
const endOfExecution = "end_of_execution"

// decodeGuest decodes a guest's JSON. It takes the memory of the values before it creates
// them.
func decodeGuest(b []byte, held *budget.Reservation, into any) error {
	values := 0
	for d := jsontext.NewDecoder(bytes.NewBuffer(b), guestJSON...); ; values++ {
		if _, err := d.ReadToken(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	if err := growForValues(held, values); err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// guestJSON makes jsontext as lenient as encoding/json.
var guestJSON = []jsontext.Options{jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)}

// collectCode merges a guest's lines into one result.
func collectCode(body io.Reader, held *budget.Reservation) (rest.CodeResult, error) {
	result := rest.CodeResult{Results: []rest.CodeOutput{}}
	var stdout, stderr strings.Builder
	bound := &io.LimitedReader{R: held.Reader(body, codeCost), N: maxCodeOutput}
	lines := jsontext.NewDecoder(bufio.NewReader(bound), guestJSON...)
	for results := 0; ; {
		var e codeEvent
		line, err := lines.ReadValue()
		if err == nil {
			err = decodeGuest(line, held, &e)
		}
		if err == nil && e.Type == "result" {
			if results++; results > freeValues {
				err = held.Grow(resultCost)
			}
		}
		if err != nil {
			if fault.Is(err, fault.RateLimited) {
				return result, err
			}
			if bound.N <= 0 {
				return result, fault.New(fault.PayloadTooLarge, "the code's output is longer than %d bytes: stream it instead", maxCodeOutput)
			}
			return result, fault.Because(err, fault.BadGateway, "the sandbox's code interpreter ended its response early")
		}
		switch e.Type {
		case "stdout":
			stdout.WriteString(or(e.Text, ""))
		case "stderr":
			stderr.WriteString(or(e.Text, ""))
		case "result":
			result.Results = append(result.Results, e.CodeOutput)
		case "error":
			result.Error = &rest.CodeError{Name: e.Name, Value: e.Value, Traceback: e.Traceback}
		case "number_of_executions":
			result.ExecutionCount = &e.ExecutionCount
		case endOfExecution:
			result.Stdout, result.Stderr = stdout.String(), stderr.String()
			return result, nil
		}
	}
}

// relay responds with the code interpreter's JSON, after decoding it into into.
func (a *API) relay(w http.ResponseWriter, r *http.Request, sandbox, method, path string, body any, status int, into any) {
	resp, err := a.gateway(r, sandbox, method, path, body)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	defer resp.Body.Close()
	if into == nil {
		w.WriteHeader(status)
		return
	}
	held := observed(r).held
	said, err := io.ReadAll(held.Reader(io.LimitReader(resp.Body, maxBody), codeCost))
	if err == nil {
		err = decodeGuest(said, held, into)
	}
	if fault.Is(err, fault.RateLimited) {
		a.Fail(w, r, err)
		return
	}
	if err != nil {
		a.Fail(w, r, fault.Because(err, fault.BadGateway, "the sandbox's code interpreter did not respond with JSON"))
		return
	}
	answer(w, status, into)
}

// ListContexts answers GET /v1/sandboxes/{sandbox_id}/code/contexts.
func (a *API) ListContexts(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.relay(w, r, sandbox, http.MethodGet, "/contexts", nil, http.StatusOK, &[]rest.CodeContext{})
}

// CreateContext answers POST /v1/sandboxes/{sandbox_id}/code/contexts.
func (a *API) CreateContext(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	var req rest.CreateContext
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	a.relay(w, r, sandbox, http.MethodPost, "/contexts", req, http.StatusCreated, &rest.CodeContext{})
}

// DeleteContext answers DELETE /v1/sandboxes/{sandbox_id}/code/contexts/{context_id}.
func (a *API) DeleteContext(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, context rest.ContextID) {
	a.relay(w, r, sandbox, http.MethodDelete, "/contexts/"+url.PathEscape(context), nil, http.StatusNoContent, nil)
}

// ChangeContext answers POST /v1/sandboxes/{sandbox_id}/code/contexts/{context_id}/{action}.
func (a *API) ChangeContext(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, context rest.ContextID, action string) {
	a.relay(w, r, sandbox, http.MethodPost, "/contexts/"+url.PathEscape(context)+"/"+url.PathEscape(action), nil, http.StatusNoContent, nil)
}

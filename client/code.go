package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// Code is what to run in a sandbox of the template code-interpreter.
type Code struct {
	Code           string            `json:"code"`
	ContextID      string            `json:"context_id,omitempty"`      // empty: the default context
	Envs           map[string]string `json:"envs,omitempty"`            // only for this run
	TimeoutSeconds int               `json:"timeout_seconds,omitempty"` // after which it is interrupted; 0: 300
}

// CodeOutput is a value or a picture that code showed, in each form that is available.
type CodeOutput struct {
	IsMainResult bool            `json:"is_main_result"` // the value of the last expression
	Text         string          `json:"text,omitempty"`
	HTML         string          `json:"html,omitempty"`
	Markdown     string          `json:"markdown,omitempty"`
	SVG          string          `json:"svg,omitempty"`
	PNG          []byte          `json:"png,omitempty"`
	JPEG         []byte          `json:"jpeg,omitempty"`
	PDF          []byte          `json:"pdf,omitempty"`
	LaTeX        string          `json:"latex,omitempty"`
	JSON         json.RawMessage `json:"json,omitempty"`
	JavaScript   string          `json:"javascript,omitempty"`
	Extra        map[string]any  `json:"extra,omitempty"` // by media type
}

// CodeError is an exception that ended the code.
type CodeError struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	Traceback string `json:"traceback"`
}

// CodeResult is what code printed and showed.
type CodeResult struct {
	Stdout         string       `json:"stdout"`
	Stderr         string       `json:"stderr"`
	Results        []CodeOutput `json:"results"`
	Error          *CodeError   `json:"error,omitempty"` // nil: the code ran to its end
	ExecutionCount int          `json:"execution_count,omitempty"`
}

// codeRequest is the body of StreamCode.
type codeRequest struct {
	Code
	Stream bool `json:"stream"`
}

// RunCode runs code and returns when it has ended. Later calls in the same context see
// what the code defined. An exception is in the result and is not an error.
func (c *Client) RunCode(ctx context.Context, id string, code Code) (*CodeResult, error) {
	var r CodeResult
	// Not retried: the code may have run.
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/code"), json: code}, &r); err != nil {
		return nil, fmt.Errorf("run code: %w", err)
	}
	return &r, nil
}

// CodeEvent is something that running code did. Exactly one field is set.
type CodeEvent struct {
	Stdout, Stderr string
	Result         *CodeOutput
	Error          *CodeError
	ExecutionCount int
}

// StreamCode runs code and calls each for everything that it prints and shows, as it
// happens. If each returns an error, the code is interrupted and StreamCode returns it.
func (c *Client) StreamCode(ctx context.Context, id string, code Code, each func(CodeEvent) error) error {
	if err := c.streamCode(ctx, id, code, each); err != nil {
		return fmt.Errorf("run code: %w", err)
	}
	return nil
}

func (c *Client) streamCode(ctx context.Context, id string, code Code, each func(CodeEvent) error) error {
	resp, err := c.do(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/code"), json: codeRequest{code, true}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for lines := json.NewDecoder(resp.Body); ; {
		var line struct {
			Type string `json:"type"`
			CodeOutput
			CodeError
			ExecutionCount int `json:"execution_count"`
		}
		if err := lines.Decode(&line); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read response: %w", err)
		}
		var e CodeEvent
		switch line.Type {
		case "stdout":
			e.Stdout = line.Text
		case "stderr":
			e.Stderr = line.Text
		case "result":
			e.Result = &line.CodeOutput
		case "error":
			e.Error = &line.CodeError
		case "number_of_executions":
			e.ExecutionCount = line.ExecutionCount
		case "end_of_execution":
			return nil
		default:
			continue
		}
		if err := each(e); err != nil {
			return err
		}
	}
}

// CodeContext is an interpreter with its own variables, which last until the context is
// deleted or restarted.
type CodeContext struct {
	ID       string `json:"id"`
	Language string `json:"language"`
	Cwd      string `json:"cwd"`
}

// CreateContext creates a context with the working directory cwd (the user's home if
// empty).
func (c *Client) CreateContext(ctx context.Context, id, cwd string) (*CodeContext, error) {
	body := struct {
		Cwd string `json:"cwd,omitempty"`
	}{cwd}
	var made CodeContext
	if err := c.call(ctx, request{method: http.MethodPost, path: sandboxPath(id, "/code/contexts"), json: body}, &made); err != nil {
		return nil, fmt.Errorf("create context: %w", err)
	}
	return &made, nil
}

// Contexts lists a sandbox's contexts. The context "default" always exists.
func (c *Client) Contexts(ctx context.Context, id string) ([]CodeContext, error) {
	var all []CodeContext
	if err := c.call(ctx, request{method: http.MethodGet, path: sandboxPath(id, "/code/contexts"), repeatable: true}, &all); err != nil {
		return nil, fmt.Errorf("list contexts: %w", err)
	}
	return all, nil
}

// DeleteContext removes a context and ends what runs in it.
func (c *Client) DeleteContext(ctx context.Context, id, context string) error {
	return c.changeContext(ctx, http.MethodDelete, id, context, "")
}

// InterruptContext interrupts what runs in a context, as Ctrl-C does.
func (c *Client) InterruptContext(ctx context.Context, id, context string) error {
	return c.changeContext(ctx, http.MethodPost, id, context, "/interrupt")
}

// RestartContext restarts a context, which loses everything that was defined in it.
func (c *Client) RestartContext(ctx context.Context, id, context string) error {
	return c.changeContext(ctx, http.MethodPost, id, context, "/restart")
}

func (c *Client) changeContext(ctx context.Context, method, id, context, action string) error {
	path := sandboxPath(id, "/code/contexts/"+url.PathEscape(context)+action)
	if err := c.call(ctx, request{method: method, path: path}, nil); err != nil {
		return fmt.Errorf("change context: %w", err)
	}
	return nil
}

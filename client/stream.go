package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	"github.com/coder/websocket"
)

// The channels of an exec stream's binary messages.
const (
	channelStdin  = 0
	channelStdout = 1
	channelStderr = 2
)

// maxMessage is the largest message that the client accepts on an exec stream, in bytes.
const maxMessage = 1<<20 + 1

// TerminalSize is the size of a terminal, in characters.
type TerminalSize struct {
	Cols int `json:"cols"`
	Rows int `json:"rows"`
}

// Stream is a command whose input and output are streamed.
type Stream struct {
	Command Command
	// Terminal is the size of the terminal to give the command; nil: none.
	Terminal *TerminalSize

	Stdin  io.Reader // nil: none
	Stdout io.Writer // also gets a terminal's output; nil: dropped
	Stderr io.Writer // nil: dropped

	Resize  <-chan TerminalSize // new sizes of the terminal
	Signals <-chan int          // numbers, as Linux on x86-64 has them
}

// streamStart, streamControl and streamEvent are text messages of ExecStream's connection.
type (
	streamStart struct {
		Command
		Stdin    bool          `json:"stdin"`
		Terminal *TerminalSize `json:"terminal,omitempty"`
	}
	streamControl struct {
		Type   string `json:"type"`
		Cols   int    `json:"cols,omitempty"`
		Rows   int    `json:"rows,omitempty"`
		Signal int    `json:"signal,omitempty"`
	}
	streamEvent struct {
		Type     string `json:"type"`
		ExitCode int    `json:"exit_code"`
		Error    string `json:"error"`
		TimedOut bool   `json:"timed_out"`
		Code     string `json:"code"`
		Message  string `json:"message"`
	}
)

// ExecStream runs a command and returns when it has ended. A Read of s.Stdin may still
// be under way then; its data is lost.
func (c *Client) ExecStream(ctx context.Context, id string, s Stream) (*Result, error) {
	r, err := c.execStream(ctx, id, s)
	if err != nil {
		return nil, fmt.Errorf("run command: %w", err)
	}
	return r, nil
}

func (c *Client) execStream(ctx context.Context, id string, s Stream) (*Result, error) {
	u := *c.base
	u.Path += sandboxPath(id, "/exec/stream")
	header := http.Header{"User-Agent": {c.agent}}
	c.identify(header)
	conn, resp, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: header})
	if err != nil {
		if resp != nil && resp.StatusCode >= 300 {
			return nil, readError(resp)
		}
		return nil, err
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxMessage)

	if err := writeJSON(ctx, conn, streamStart{s.Command, s.Stdin != nil, s.Terminal}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var senders sync.WaitGroup
	defer senders.Wait()
	defer cancel()
	senders.Go(func() { sendControl(ctx, conn, s) })
	if s.Stdin != nil {
		// Nobody waits for this goroutine, because a Read of a terminal may never return.
		go sendInput(ctx, conn, s.Stdin)
	}
	return receive(ctx, conn, s)
}

// receive passes the command's output to s until the command has ended.
func receive(ctx context.Context, conn *websocket.Conn, s Stream) (*Result, error) {
	writers := map[byte]io.Writer{channelStdout: s.Stdout, channelStderr: s.Stderr}
	for {
		kind, b, err := conn.Read(ctx)
		if err != nil {
			return nil, fmt.Errorf("the connection broke before the command ended: %w", err)
		}
		if kind == websocket.MessageBinary {
			if len(b) == 0 {
				return nil, errors.New("the service sent a message without a channel")
			}
			if w := writers[b[0]]; w != nil {
				if _, err := w.Write(b[1:]); err != nil {
					return nil, fmt.Errorf("write output: %w", err)
				}
			}
			continue
		}
		var e streamEvent
		if err := json.Unmarshal(b, &e); err != nil {
			return nil, fmt.Errorf("read response: %w", err)
		}
		switch e.Type {
		case "exited":
			return &Result{ExitCode: e.ExitCode, Error: e.Error, TimedOut: e.TimedOut}, nil
		case "error":
			return nil, &Error{Code: e.Code, Message: e.Message}
		}
	}
}

// sendControl sends terminal sizes and signals until ctx ends.
func sendControl(ctx context.Context, conn *websocket.Conn, s Stream) {
	resize, signals := s.Resize, s.Signals
	for {
		var m streamControl
		select {
		case <-ctx.Done():
			return
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			m = streamControl{Type: "resize", Cols: size.Cols, Rows: size.Rows}
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			m = streamControl{Type: "signal", Signal: sig}
		}
		if writeJSON(ctx, conn, m) != nil {
			return // the reader finds out why
		}
	}
}

// sendInput sends standard input until its end.
func sendInput(ctx context.Context, conn *websocket.Conn, r io.Reader) {
	buf := make([]byte, 32<<10)
	buf[0] = channelStdin
	for {
		n, err := r.Read(buf[1:])
		if ctx.Err() != nil {
			return
		}
		if n > 0 && conn.Write(ctx, websocket.MessageBinary, buf[:n+1]) != nil {
			return // the reader finds out why
		}
		if err != nil {
			_ = writeJSON(ctx, conn, map[string]string{"type": "close_stdin"})
			return
		}
	}
}

func writeJSON(ctx context.Context, conn *websocket.Conn, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return conn.Write(ctx, websocket.MessageText, b)
}

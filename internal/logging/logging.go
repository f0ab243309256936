// Package logging creates a program's log, whose level and format can change while the
// program runs.
package logging

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
)

// Format is the encoding of a log's records.
type Format string

// The formats. Text has key=value pairs.
const (
	Text Format = "text"
	JSON Format = "json"
)

// UnmarshalText implements [encoding.TextUnmarshaler].
func (f *Format) UnmarshalText(text []byte) error {
	switch Format(text) {
	case Text, JSON:
		*f = Format(text)
		return nil
	}
	return fmt.Errorf("log format %q: want %s or %s", text, Text, JSON)
}

// Settings configure a program's log.
type Settings struct {
	Level  slog.Level `env:"WRENN_LOG_LEVEL" envDefault:"info" help:"lowest level that is logged: debug, info, warn or error; SIGHUP reads it again from the settings file"`
	Format Format     `env:"WRENN_LOG_FORMAT" envDefault:"text" help:"text or json; SIGHUP reads it again from the settings file"`
}

// Log is the log of a program. Its methods are safe for concurrent use.
type Log struct {
	*slog.Logger
	level slog.LevelVar
	json  atomic.Bool
}

// maxValue bounds each value of a record, in bytes, because clients and guests choose
// some of them.
const maxValue = 16 << 10

// short truncates a value that is longer than maxValue.
func short(_ []string, a slog.Attr) slog.Attr {
	s := ""
	switch v := a.Value.Any().(type) {
	case string:
		s = v
	case error:
		s = v.Error()
	}
	if len(s) > maxValue {
		a.Value = slog.StringValue(strings.ToValidUTF8(s[:maxValue], "") + " …")
	}
	return a
}

// New returns a log that writes to w. It truncates values that are longer than 16 KiB.
func New(w io.Writer, s Settings) *Log {
	l := &Log{}
	options := &slog.HandlerOptions{Level: &l.level, ReplaceAttr: short}
	l.Logger = slog.New(handler{&l.json, slog.NewTextHandler(w, options), slog.NewJSONHandler(w, options)})
	l.Set(s)
	return l
}

// Set changes the level and format of l and of all loggers derived from it.
func (l *Log) Set(s Settings) {
	l.level.Set(s.Level)
	l.json.Store(s.Format == JSON)
}

// handler passes records to one of two handlers, which have the same level.
type handler struct {
	useJSON    *atomic.Bool
	text, json slog.Handler
}

func (h handler) current() slog.Handler {
	if h.useJSON.Load() {
		return h.json
	}
	return h.text
}

func (h handler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.text.Enabled(ctx, level)
}

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	return h.current().Handle(ctx, r)
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.useJSON, h.text.WithAttrs(attrs), h.json.WithAttrs(attrs)}
}

func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.useJSON, h.text.WithGroup(name), h.json.WithGroup(name)}
}

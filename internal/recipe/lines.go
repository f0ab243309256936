package recipe

import (
	"fmt"
	"sort"
	"strings"
	"unicode/utf8"
)

// blanks separate words within a line.
const blanks = " \t"

func blank(c byte) bool { return c == ' ' || c == '\t' }

// line is a logical line: joined physical lines, without comments between them.
type line struct {
	text  string
	spans []span

	// near is the last result of position. Counting on from there, all positions of a line
	// take one pass.
	near span
}

// span says where in the recipe the line's text from offset on begins.
type span struct {
	offset int
	from   Position
}

// position returns the position in the recipe of an offset in the line.
func (l *line) position(offset int) Position {
	// An offset between two physical lines counts as the end of the first one.
	n := sort.Search(len(l.spans)-1, func(i int) bool {
		next := l.spans[i+1].offset
		return next > offset || next == offset && offset == len(l.text)
	})
	s := l.spans[n]
	if l.near.from.Line == s.from.Line && l.near.offset <= offset {
		s = l.near
	}
	l.near = span{offset, Position{s.from.Line, s.from.Column + utf8.RuneCountInString(l.text[s.offset:offset])}}
	return l.near.from
}

// builder joins the physical lines of a line.
type builder struct {
	text  strings.Builder
	spans []span
}

func (b *builder) add(text string, from Position) {
	if text == "" && len(b.spans) > 0 {
		return
	}
	b.spans = append(b.spans, span{b.text.Len(), from})
	b.text.WriteString(text)
}

func (b *builder) line() *line { return &line{text: b.text.String(), spans: b.spans} }

// check refuses text that cannot be a recipe: too long, not UTF-8, or with control
// characters.
func check(text string) *Error {
	if len(text) > MaxSize {
		return &Error{Position{1, 1}, fmt.Sprintf("the recipe is longer than %d bytes", MaxSize)}
	}
	at := Position{1, 1}
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], string(utf8.RuneError)):
			return &Error{at, "the text is not UTF-8"}
		case r == '\n':
			at = Position{at.Line + 1, 1}
			continue
		case r == '\r' && strings.HasPrefix(text[i+1:], "\n"):
		case r < ' ' && r != '\t':
			return &Error{at, fmt.Sprintf("the text contains the control character %U", r)}
		}
		at.Column++
	}
	return nil
}

// maxInstructions bounds a recipe's instructions, and so the memory for parsing it.
const maxInstructions = 10_000

// split splits a checked recipe into logical lines. If it fails, it returns the lines
// before the error, too.
func split(text string) ([]*line, *Error) {
	const bom = "\ufeff"
	physical := strings.Split(text, "\n")
	var lines []*line
	var open *builder // is continued
	directives := true
	var last Position // of the backslash that continues
	for i, raw := range physical {
		raw = strings.TrimSuffix(raw, "\r")
		column := 1
		if i == 0 && strings.HasPrefix(raw, bom) {
			raw, column = raw[len(bom):], 2
		}
		trimmed := strings.TrimLeft(raw, blanks)
		if strings.HasPrefix(trimmed, "#") {
			if directives && open == nil {
				isOne, err := directive(trimmed)
				if err != "" {
					return lines, &Error{Position{i + 1, column + len(raw) - len(trimmed)}, err}
				}
				directives = isOne
			}
			continue
		}
		directives = false
		if trimmed == "" {
			continue // within a continued line, too, as in a Dockerfile
		}
		if open == nil {
			if len(lines) == maxInstructions {
				return lines, &Error{Position{i + 1, column}, fmt.Sprintf("more than %d instructions", maxInstructions)}
			}
			column += len(raw) - len(trimmed)
			raw = trimmed
			open = &builder{}
		}
		content := strings.TrimRight(raw, blanks)
		continued := strings.HasSuffix(content, `\`) && !strings.HasSuffix(content, `\\`)
		if continued {
			raw = content[:len(content)-1]
			last = Position{i + 1, column + utf8.RuneCountInString(raw)}
		}
		open.add(raw, Position{i + 1, column})
		if !continued {
			lines = append(lines, open.line())
			open = nil
		}
	}
	if open != nil {
		return lines, &Error{last, "this \\ continues the line, but no line follows"}
	}
	return lines, nil
}

// directive reports whether a comment at the top of the recipe is a parser directive of
// Dockerfiles, and what is wrong with it. Directives for other programs are ignored.
func directive(comment string) (is bool, wrong string) {
	key, value, ok := strings.Cut(strings.TrimLeft(comment, "#"+blanks), "=")
	if !ok {
		return false, ""
	}
	switch strings.ToLower(strings.TrimSpace(key)) {
	case "escape":
		if v := strings.TrimSpace(value); v != `\` {
			return true, fmt.Sprintf("the escape character of recipes is the backslash, and cannot be %q", v)
		}
		return true, ""
	case "syntax", "check":
		return true, ""
	}
	return false, ""
}

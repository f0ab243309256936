package recipe

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// MaxExpanded bounds an expanded word, in bytes. It is Linux's limit for one argument or
// one variable (MAX_ARG_STRLEN, execve(2)), without the final NUL.
const MaxExpanded = 128<<10 - 1

// maxDepth bounds the nesting of variables.
const maxDepth = 32

// Word is a text with variables, whose quotes and escapes are resolved.
type Word struct {
	Pos   Position
	parts []part
}

// part is a literal text, or a variable.
type part struct {
	text string
	name string // empty: text
	op   string // "", "-", ":-", "+" or ":+"
	alt  []part // after op
}

// Expand replaces the word's variables with the values that lookup returns; unset ones are
// empty. If the text is longer than MaxExpanded, the error is an *Error.
func (w Word) Expand(lookup func(name string) (value string, set bool)) (string, error) {
	var b strings.Builder
	if !expand(&b, w.parts, lookup) {
		return "", &Error{w.Pos, fmt.Sprintf("with its variables expanded, this is longer than %d bytes", MaxExpanded)}
	}
	return b.String(), nil
}

func expand(b *strings.Builder, parts []part, lookup func(string) (string, bool)) bool {
	for _, p := range parts {
		text := p.text
		if p.name != "" {
			value, set := lookup(p.name)
			if strings.HasPrefix(p.op, ":") {
				set = value != ""
			}
			switch {
			case strings.HasSuffix(p.op, "+") == set && p.op != "":
				if !expand(b, p.alt, lookup) {
					return false
				}
			case !strings.HasSuffix(p.op, "+"):
				text = value
			}
		}
		if b.Len()+len(text) > MaxExpanded {
			return false
		}
		b.WriteString(text)
	}
	return true
}

// Literal returns the word's text, if it has no variables.
func (w Word) Literal() (text string, ok bool) {
	switch len(w.parts) {
	case 0:
		return "", true
	case 1:
		return w.parts[0].text, w.parts[0].name == ""
	}
	return "", false // neighbouring literals are one
}

// String returns the word's canonical form, in double quotes if it needs quotes.
func (w Word) String() string { return render(w.parts, "") }

// render returns text that a scanner parses to the same parts. special has further bytes
// that need quotes in the context of the text.
func render(parts []part, special string) string {
	bare := len(parts) > 0
	for i, p := range parts {
		if p.name == "" && (strings.ContainsAny(p.text, " \t'\"\\$<"+special) ||
			i == 0 && (strings.HasPrefix(p.text, "[") || strings.HasPrefix(p.text, "-"))) {
			bare = false
		}
	}
	var b strings.Builder
	for _, p := range parts {
		switch {
		case p.name != "" && p.op != "":
			b.WriteString("${" + p.name + p.op + render(p.alt, "}") + "}")
		case p.name != "":
			b.WriteString("${" + p.name + "}")
		case bare:
			b.WriteString(p.text)
		default:
			b.WriteString(quoter.Replace(p.text))
		}
	}
	if bare {
		return b.String()
	}
	return `"` + b.String() + `"`
}

var quoter = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`)

// scanner reads words from a logical line.
type scanner struct {
	line *line
	text string // the line's
	at   int
	left *int // how many words and variables the recipe may still have
}

// maxWords bounds the words and variables of a recipe, and so the memory for parsing it.
const maxWords = 50_000

// take subtracts n from the words and variables that the recipe may still have.
func (s *scanner) take(at, n int) *Error {
	if *s.left -= n; *s.left < 0 {
		return s.fail(at, "more than %d words and variables", maxWords)
	}
	return nil
}

func (s *scanner) more() bool { return s.at < len(s.text) }

func (s *scanner) skipBlanks() {
	for s.more() && blank(s.text[s.at]) {
		s.at++
	}
}

// rest returns the text that was not read yet, without surrounding blanks.
func (s *scanner) rest() string {
	s.skipBlanks()
	return strings.TrimRight(s.text[s.at:], blanks)
}

// fail returns an error at an offset of the line.
func (s *scanner) fail(at int, format string, args ...any) *Error {
	return &Error{s.line.position(at), fmt.Sprintf(format, args...)}
}

// end says which characters end a word.
type end int

const (
	atLineEnd end = iota
	atBlank
	atBrace
)

// word reads a word up to its end, which it does not read.
func (s *scanner) word(until end) (Word, *Error) {
	w := Word{Pos: s.line.position(s.at)}
	if err := s.take(s.at, 1); err != nil {
		return w, err
	}
	parts, err := s.parts(until, 0)
	w.parts = parts
	return w, err
}

func (s *scanner) parts(until end, depth int) ([]part, *Error) {
	var list parts
	for s.more() {
		switch c := s.text[s.at]; {
		case until == atBlank && blank(c), until == atBrace && c == '}':
			return list.done(), nil
		case c == '\'':
			n := strings.IndexByte(s.text[s.at+1:], '\'')
			if n < 0 {
				return nil, s.fail(s.at, "this quote is not closed")
			}
			list.add(s.text[s.at+1 : s.at+1+n])
			s.at += n + 2
		case c == '"':
			if err := s.quoted(&list, depth); err != nil {
				return nil, err
			}
		case c == '\\':
			if s.at++; !s.more() {
				return nil, s.fail(s.at-1, "nothing follows this backslash; for a backslash itself write two")
			}
			list.add(s.char())
		case c == '$':
			if err := s.dollar(&list, depth); err != nil {
				return nil, err
			}
		default:
			list.add(s.char())
		}
	}
	return list.done(), nil
}

// parts is a list that joins neighbouring literals.
type parts struct {
	list    []part
	literal strings.Builder // comes after list
}

func (l *parts) add(text string) { l.literal.WriteString(text) }

func (l *parts) variable(p part) { l.list = append(l.done(), p) }

// done returns the whole list.
func (l *parts) done() []part {
	if l.literal.Len() > 0 {
		l.list = append(l.list, part{text: l.literal.String()})
		l.literal.Reset()
	}
	return l.list
}

// char reads one character.
func (s *scanner) char() string {
	_, n := utf8.DecodeRuneInString(s.text[s.at:])
	s.at += n
	return s.text[s.at-n : s.at]
}

// quoted reads from one double quote to the next.
func (s *scanner) quoted(list *parts, depth int) *Error {
	open := s.at
	s.at++
	for s.more() {
		switch c := s.text[s.at]; c {
		case '"':
			s.at++
			return nil
		case '$':
			if err := s.dollar(list, depth); err != nil {
				return err
			}
		case '\\':
			s.at++
			if !s.more() {
				return s.fail(open, "this quote is not closed")
			}
			if !strings.ContainsRune(`"$\`, rune(s.text[s.at])) {
				list.add(`\`) // here the backslash only escapes these three characters
			}
			list.add(s.char())
		default:
			list.add(s.char())
		}
	}
	return s.fail(open, "this quote is not closed")
}

// dollar reads a variable, or a dollar sign before what cannot be a name.
func (s *scanner) dollar(list *parts, depth int) *Error {
	start := s.at
	if err := s.take(start, 1); err != nil {
		return err
	}
	s.at++
	if !s.more() {
		list.add("$")
		return nil
	}
	c := s.text[s.at]
	if c != '{' {
		if name := s.name(); name != "" {
			list.variable(part{name: name})
			return nil
		}
		if strings.IndexByte("@*#?-$!", c) >= 0 || c >= '0' && c <= '9' {
			return s.fail(start, `recipes have no $%c; for a dollar sign write \$`, c)
		}
		list.add("$")
		return nil
	}
	s.at++
	name := s.name()
	if name == "" {
		return s.fail(start, "this ${ has no variable's name")
	}
	p := part{name: name}
	for _, op := range []string{":-", ":+", "-", "+"} {
		if strings.HasPrefix(s.text[s.at:], op) {
			p.op = op
			break
		}
	}
	if s.at += len(p.op); p.op != "" {
		if depth == maxDepth {
			return s.fail(start, "more than %d nested variables", maxDepth)
		}
		var err *Error
		if p.alt, err = s.parts(atBrace, depth+1); err != nil {
			return err
		}
	}
	if !s.more() {
		return s.fail(start, "this ${ has no }")
	}
	if s.text[s.at] != '}' {
		return s.fail(s.at, "after a variable's name, ${} may contain only :-, -, :+ or +")
	}
	s.at++
	list.variable(p)
	return nil
}

// name reads a variable's name, which may be empty.
func (s *scanner) name() string {
	start := s.at
	for s.more() {
		c := s.text[s.at]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '_'
		if !letter && (s.at == start || c < '0' || c > '9') {
			break
		}
		s.at++
	}
	return s.text[start:s.at]
}

package recipe

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
)

// imageScheme is the prefix of an OCI image's name.
const imageScheme = "oci:"

var (
	templateName = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9_.-]{0,61}[a-z0-9])?$`)
	templateTag  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]*$`)
	modeBits     = regexp.MustCompile(`^[0-7]{3,4}$`)
	hereDocument = regexp.MustCompile(`^[0-9]*<<-?[ \t]*[^<\s]`)
)

// instead says what to write instead of a Dockerfile's instructions that recipes lack.
var instead = map[string]string{
	"ADD":        "recipes have no ADD: use COPY for files, and RUN with curl or tar otherwise",
	"ARG":        "recipes have no ARG: use ENV, or write the value",
	"CMD":        "recipes have no CMD: use START for the command that runs in the template",
	"ENTRYPOINT": "recipes have no ENTRYPOINT: use START for the command that runs in the template",
	"EXPOSE":     "recipes have no EXPOSE: clients can reach every port of a sandbox; remove this line",
	"LABEL":      "recipes have no LABEL: a template has a name and tags; remove this line",
	"MAINTAINER": "recipes have no MAINTAINER: write a comment",
	"ONBUILD":    "recipes have no ONBUILD: put the instruction into the recipes that start from this template",
	"SHELL":      `recipes have no SHELL: name the shell in the command, as in RUN ["/bin/bash", "-c", "…"]`,
	"STOPSIGNAL": "recipes have no STOPSIGNAL: a sandbox shuts down like a machine; remove this line",
	"VOLUME":     "recipes have no VOLUME: the whole disk is the sandbox's own; remove this line",
}

const known = "FROM, RUN, ENV, COPY, WORKDIR, USER, LIMIT, START and HEALTHCHECK"

// Parse parses a recipe. Its error is Errors, which has the mistakes of all instructions.
func Parse(text string) (*Recipe, error) {
	if err := check(text); err != nil {
		return nil, Errors{err}
	}
	lines, broken := split(text)
	left := maxWords
	p := parser{recipe: &Recipe{}, left: &left}
	for _, l := range lines {
		err := p.instruction(l)
		if err == nil {
			continue
		}
		p.errs = append(p.errs, err.Error)
		if err.last || len(p.errs) == maxErrors {
			return nil, p.errs
		}
	}
	if broken != nil {
		p.errs = append(p.errs, broken)
	}
	if !p.from && p.errs == nil {
		p.errs = append(p.errs, &Error{Position{1, 1}, "the recipe is empty; a recipe begins with FROM"})
	}
	if p.errs != nil {
		return nil, p.errs
	}
	return p.recipe, nil
}

type parser struct {
	recipe *Recipe
	from   bool // there was one, right or wrong
	late   bool // it was said that FROM is missing
	errs   Errors
	left   *int // words
}

// failure is an error, after which parsing may have to stop.
type failure struct {
	*Error
	last bool
}

// instruction parses one logical line.
func (p *parser) instruction(l *line) *failure {
	s := &scanner{line: l, text: l.text, left: p.left}
	s.skipBlanks()
	at, start := s.at, l.position(s.at)
	for s.more() && !blank(s.text[s.at]) {
		s.at++
	}
	word := s.text[at:s.at]
	keyword := strings.ToUpper(word)
	s.skipBlanks()
	if keyword == "FROM" {
		if p.from {
			return &failure{Error: s.fail(at, "a second FROM: a recipe has one stage; the first FROM is at %v", p.recipe.From.Pos)}
		}
		p.from = true
		p.recipe.From.Pos = start
		return wrap(p.parseFrom(s))
	}
	read, ok := map[string]func(*scanner, Position) *failure{
		"RUN": p.parseRun, "ENV": p.parseEnv, "COPY": p.parseCopy, "WORKDIR": p.parseWorkdir,
		"USER": p.parseUser, "LIMIT": p.parseLimit, "START": p.parseStart, "HEALTHCHECK": p.parseHealthCheck,
	}[keyword]
	if !ok {
		if hint := instead[keyword]; hint != "" {
			return wrap(s.fail(at, "%s", hint))
		}
		return wrap(s.fail(at, "unknown instruction %.40q; the instructions are %s", word, known))
	}
	if !p.from && !p.late {
		p.late = true
		return wrap(s.fail(at, "%s comes before FROM; a recipe begins with FROM", keyword))
	}
	return read(s, start)
}

func wrap(err *Error) *failure {
	if err == nil {
		return nil
	}
	return &failure{Error: err}
}

func (p *parser) step(s Step) { p.recipe.Steps = append(p.recipe.Steps, s) }

func (p *parser) parseFrom(s *scanner) *Error {
	f := &p.recipe.From
	rest := s.rest()
	if strings.HasPrefix(rest, "--") {
		return s.fail(s.at, "FROM takes no flags: templates are for linux/amd64")
	}
	ref, more, _ := strings.Cut(strings.ReplaceAll(rest, "\t", " "), " ")
	if ref == "" {
		return s.fail(s.at, "FROM needs the name of a template, or oci: and the name of an image")
	}
	if more != "" {
		at := len(s.text) - len(strings.TrimLeft(s.text[s.at+len(ref):], blanks))
		if next := strings.Fields(more)[0]; strings.EqualFold(next, "AS") {
			return s.fail(at, "a recipe has one stage, which needs no name")
		}
		return s.fail(at, "FROM takes one name")
	}
	if i := strings.IndexByte(ref, '$'); i >= 0 {
		return s.fail(s.at+i, "FROM takes no variables: there are none before it")
	}
	if image, ok := strings.CutPrefix(ref, imageScheme); ok {
		if _, err := name.ParseReference(image); err != nil {
			return s.fail(s.at+len(imageScheme), "%.200q is not an image's reference", image)
		}
		f.Image = image
		return nil
	}
	template, tag, tagged := strings.Cut(ref, ":")
	switch {
	case ref == "scratch":
		return s.fail(s.at, "recipes cannot start from scratch: start from minimal, or from oci: and the name of an image")
	case strings.ContainsAny(ref, "/@"):
		return s.fail(s.at, "%.200q is not a template's name; for an OCI image write oci: before the name", ref)
	case !templateName.MatchString(template):
		return s.fail(s.at, "%.200q is not a template's name: use up to 63 of a-z and 0-9, and between them . _ -", template)
	case tagged && !templateTag.MatchString(tag):
		return s.fail(s.at+len(template)+1, "%.200q is not a tag: use up to 128 of A-Z, a-z, 0-9 and _, and after the first also . -", tag)
	}
	f.Template, f.Tag = template, tag
	return nil
}

func (p *parser) parseRun(s *scanner, pos Position) *failure {
	c, err := command(s, "RUN")
	if err == nil {
		p.step(&Run{pos, c})
	}
	return err
}

func (p *parser) parseStart(s *scanner, pos Position) *failure {
	c, err := command(s, "START")
	if err != nil {
		return err
	}
	if p.recipe.Start != nil {
		return &failure{Error: &Error{pos, "a second START; the first is at " + p.recipe.Start.Pos.String()}}
	}
	p.recipe.Start = &Start{pos, c}
	return nil
}

func (p *parser) parseLimit(s *scanner, pos Position) *failure {
	l := &Limit{Pos: pos, Limits: map[string]int64{}}
	names := strings.Join(slices.Sorted(maps.Keys(MinLimits)), ", ")
	for s.skipBlanks(); s.more(); s.skipBlanks() {
		at := s.at
		for s.more() && !blank(s.text[s.at]) {
			s.at++
		}
		name, number, _ := strings.Cut(s.text[at:s.at], "=")
		least, ok := MinLimits[name]
		if !ok {
			return wrap(s.fail(at, "unknown limit %.40q; the limits are %s", name, names))
		}
		if _, twice := l.Limits[name]; twice {
			return wrap(s.fail(at, "a second %s", name))
		}
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil || n != 0 && (n < least || n > MaxLimit) {
			return wrap(s.fail(at, "%s needs a number from %d to %d, or 0 for no limit", name, least, int64(MaxLimit)))
		}
		l.Limits[name] = n
	}
	if len(l.Limits) == 0 {
		return wrap(s.fail(s.at, "LIMIT needs NAME=NUMBER; the names are %s", names))
	}
	if p.recipe.Limit != nil {
		return wrap(&Error{pos, "a second LIMIT; the first is at " + p.recipe.Limit.Pos.String()})
	}
	p.recipe.Limit = l
	return nil
}

// command parses a command in shell or exec form.
func command(s *scanner, keyword string) (Command, *failure) {
	rest := s.rest()
	if rest == "" {
		return Command{}, wrap(s.fail(s.at, "%s needs a command", keyword))
	}
	if strings.HasPrefix(rest, "--") {
		return Command{}, wrap(s.fail(s.at, "%s takes no flags in a recipe", keyword))
	}
	if rest[0] == '[' {
		args, err := s.array(rest)
		switch {
		case err != nil:
			return Command{}, wrap(err)
		case args == nil:
		case len(args) == 0 || args[0] == "":
			return Command{}, wrap(s.fail(s.at, "the list contains no program"))
		default:
			return Command{Exec: args}, nil
		}
	}
	if at := findHereDocument(rest); at >= 0 {
		return Command{}, &failure{hereDocumentError(s, s.at+at), true}
	}
	return Command{Shell: rest}, nil
}

func hereDocumentError(s *scanner, at int) *Error {
	return s.fail(at, "recipes have no here-documents: continue the line with \\, or COPY a file; the parser stops here")
}

// findHereDocument returns the offset of the first here-document in a shell command, or
// -1. As in a Dockerfile, that is an unquoted word which begins like one.
func findHereDocument(text string) int {
	begins := true // a word
	for i := 0; i < len(text); i++ {
		if begins && strings.IndexByte("<0123456789", text[i]) >= 0 && hereDocument.MatchString(text[i:]) {
			return i
		}
		begins = blank(text[i])
		switch text[i] {
		case '\\':
			i++
		case '\'':
			n := strings.IndexByte(text[i+1:], '\'')
			if n < 0 {
				return -1
			}
			i += n + 1
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		}
	}
	return -1
}

// array parses a JSON array of strings. It returns nil if the text is something else that
// is valid, because the shell has a command [, which is followed by a blank.
func (s *scanner) array(text string) ([]string, *Error) {
	// Each string but the last has a comma behind it; the shell's words may have some, too.
	if err := s.take(s.at, strings.Count(text, ",")); err != nil {
		return nil, err
	}
	var list []any
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		if !strings.HasPrefix(text, `["`) {
			return nil, nil
		}
		at := len(text)
		if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
			at = min(max(0, int(syntax.Offset)-1), at)
		}
		return nil, s.fail(s.at+boundary(text, at), "this is not a JSON array of strings in double quotes")
	}
	args := make([]string, 0, len(list))
	for _, v := range list {
		a, ok := v.(string)
		if !ok {
			return nil, s.fail(s.at, "a list may contain only strings in double quotes")
		}
		if strings.ContainsRune(a, 0) {
			return nil, s.fail(s.at, "an argument cannot contain a NUL character")
		}
		args = append(args, a)
	}
	return args, nil
}

// boundary returns the start of the character at the offset at.
func boundary(text string, at int) int {
	for at > 0 && at < len(text) && text[at]&0xc0 == 0x80 {
		at--
	}
	return at
}

// array returns the canonical form of a list of strings.
func array(list []string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	for i, a := range list {
		if i > 0 {
			b.WriteString(", ")
		}
		_ = e.Encode(a) // a string, into memory
		b.Truncate(b.Len() - 1)
	}
	return "[" + b.String() + "]"
}

func (p *parser) parseEnv(s *scanner, pos Position) *failure {
	e := &Env{Pos: pos}
	if s.rest() == "" {
		return wrap(s.fail(s.at, "ENV needs NAME=VALUE"))
	}
	for s.skipBlanks(); s.more(); s.skipBlanks() {
		at := s.at
		n := strings.IndexAny(s.text[at:], "="+blanks)
		if n < 0 {
			n = len(s.text) - at
		}
		key := s.text[at : at+n]
		if !variableName.MatchString(key) {
			return wrap(s.fail(at, "%.200q is not a variable's name: use letters, digits, _ . and -, and no digit first", key))
		}
		s.at += n
		old := false
		if !s.more() || s.text[s.at] != '=' {
			// The old form, ENV NAME VALUE.
			if len(e.Vars) > 0 || s.rest() == "" {
				return wrap(s.fail(at, "%.200s has no value: write NAME=VALUE", key))
			}
			old = true
		} else {
			s.at++
		}
		until := atBlank
		if old {
			until = atLineEnd
			s.text = strings.TrimRight(s.text, blanks)
		}
		w, err := s.word(until)
		if err != nil {
			return wrap(err)
		}
		e.Vars = append(e.Vars, Var{key, w})
	}
	p.step(e)
	return nil
}

// flag is one --name=value before an instruction's arguments.
type flag struct {
	name  string
	value Word
	at    int // offset of the flag
}

// flags parses flags. hints say what to write instead of some flags that recipes lack.
func (s *scanner) flags(names []string, hints map[string]string) ([]flag, *Error) {
	var list []flag
	for s.skipBlanks(); strings.HasPrefix(s.text[s.at:], "--"); s.skipBlanks() {
		at := s.at
		n := strings.IndexAny(s.text[at:], "="+blanks)
		if n < 0 {
			n = len(s.text) - at
		}
		key := s.text[at+2 : at+n]
		is := false
		for _, n := range names {
			is = is || n == key
		}
		if !is {
			if h := hints[key]; h != "" {
				return nil, s.fail(at, "%s", h)
			}
			return nil, s.fail(at, "unknown flag --%.100s; the flags are --%s", key, strings.Join(names, ", --"))
		}
		for _, f := range list {
			if f.name == key {
				return nil, s.fail(at, "a second --%s", key)
			}
		}
		if s.at += n; !s.more() || s.text[s.at] != '=' {
			return nil, s.fail(at, "--%s needs a value: --%s=…", key, key)
		}
		s.at++
		w, err := s.word(atBlank)
		if err != nil {
			return nil, err
		}
		list = append(list, flag{key, w, at})
	}
	return list, nil
}

var copyHints = map[string]string{
	"from":    "COPY takes no --from: a recipe has one stage, and COPY copies only from the build's folder",
	"link":    "COPY takes no --link: remove it; it has no effect here",
	"parents": "COPY takes no --parents: copy the folder, or name each target",
	"exclude": "COPY takes no --exclude: list the files to leave out in .wrennignore",
}

func (p *parser) parseCopy(s *scanner, pos Position) *failure {
	c := &Copy{Pos: pos}
	flags, err := s.flags([]string{"chmod", "chown"}, copyHints)
	if err != nil {
		return wrap(err)
	}
	for _, f := range flags {
		text, literal := f.value.Literal()
		if f.name == "chown" {
			if literal && text == "" {
				return wrap(s.fail(f.at, "--chown needs a user, or user:group"))
			}
			c.Owner = &f.value
			continue
		}
		if !literal || !modeBits.MatchString(text) {
			return wrap(s.fail(f.at, "--chmod needs a mode of three or four octal digits"))
		}
		mode, _ := strconv.ParseUint(text, 8, 12) // three or four octal digits
		bits := uint32(mode)
		c.Mode = &bits
	}
	words, fail := s.paths()
	if fail != nil {
		return fail
	}
	if len(words) < 2 {
		return wrap(s.fail(len(s.text), "COPY needs a source and a target"))
	}
	last := len(words) - 1
	c.Sources, c.Target = words[:last:last], words[last]
	many := len(c.Sources) > 1
	for _, w := range c.Sources {
		text, literal := w.Literal()
		if !literal {
			continue
		}
		if wrong := wrongSource(text); wrong != "" {
			return wrap(&Error{w.Pos, wrong})
		}
		many = many || strings.ContainsAny(text, "*?[")
	}
	text, literal := c.Target.Literal()
	if literal && text == "" {
		return wrap(&Error{c.Target.Pos, "the target is empty"})
	}
	if literal && many && !strings.HasSuffix(text, "/") && text != "." && text != ".." {
		return wrap(&Error{c.Target.Pos, "several files need a folder as their target: end it with /"})
	}
	p.step(c)
	return nil
}

// paths parses COPY's arguments in either form.
func (s *scanner) paths() ([]Word, *failure) {
	rest := s.rest()
	var words []Word
	if strings.HasPrefix(rest, "[") {
		list, err := s.array(rest)
		if err != nil {
			return nil, wrap(err)
		}
		if list != nil {
			for _, text := range list {
				if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' && r != '\t' }); i >= 0 {
					return nil, wrap(s.fail(s.at, "a path cannot contain a control character"))
				}
				// Offsets in the string are not the line's: all count as the list's begin.
				at := s.line.position(s.at)
				in := &scanner{line: &line{text: text, spans: []span{{0, at}}}, text: text, left: s.left}
				w, err := in.word(atLineEnd)
				if err != nil {
					return nil, wrap(&Error{at, err.Message})
				}
				w.Pos = at
				words = append(words, w)
			}
			s.at = len(s.text)
			return words, nil
		}
	}
	for s.skipBlanks(); s.more(); s.skipBlanks() {
		if hereDocument.MatchString(s.text[s.at:]) {
			return nil, &failure{hereDocumentError(s, s.at), true}
		}
		w, err := s.word(atBlank)
		if err != nil {
			return nil, wrap(err)
		}
		words = append(words, w)
	}
	return words, nil
}

// wrongSource returns why a path cannot be a source of COPY, or "".
func wrongSource(text string) string {
	if text == "" {
		return "the path is empty"
	}
	for _, scheme := range []string{"http://", "https://", "ftp://", "git://", "ssh://", "git@"} {
		if strings.HasPrefix(strings.ToLower(text), scheme) {
			return "COPY copies only from the build's folder: fetch this with RUN curl or RUN git"
		}
	}
	for part := range strings.SplitSeq(text, "/") {
		if part == ".." {
			return "COPY copies only from the build's folder, and .. leads out of it"
		}
	}
	return ""
}

// value reads the rest of the line as one word, which must not be empty.
func (s *scanner) value(missing string) (Word, *Error) {
	s.text = strings.TrimRight(s.text, blanks)
	s.skipBlanks()
	at := s.at
	if !s.more() {
		return Word{}, s.fail(at, "%s", missing)
	}
	w, err := s.word(atLineEnd)
	if err != nil {
		return Word{}, err
	}
	if text, literal := w.Literal(); literal && text == "" {
		return Word{}, s.fail(at, "%s", missing)
	}
	return w, nil
}

func (p *parser) parseWorkdir(s *scanner, pos Position) *failure {
	w, err := s.value("WORKDIR needs a folder")
	if err != nil {
		return wrap(err)
	}
	p.step(&Workdir{pos, w})
	return nil
}

func (p *parser) parseUser(s *scanner, pos Position) *failure {
	w, err := s.value("USER needs a user, or user:group")
	if err != nil {
		return wrap(err)
	}
	p.step(&User{pos, w})
	return nil
}

func (p *parser) parseHealthCheck(s *scanner, pos Position) *failure {
	h := &HealthCheck{Pos: pos}
	flags, err := s.flags([]string{"interval", "timeout", "start-period", "retries"}, map[string]string{
		"start-interval": "HEALTHCHECK takes no --start-interval: --interval holds from the start",
	})
	if err != nil {
		return wrap(err)
	}
	for _, f := range flags {
		text, literal := f.value.Literal()
		if f.name == "retries" {
			n, err := strconv.ParseUint(text, 10, 16)
			if err != nil || !literal {
				return wrap(s.fail(f.at, "--retries needs a number from 0 to 65535"))
			}
			h.Retries = int(n)
			continue
		}
		d, err := time.ParseDuration(text)
		if err != nil || !literal || d < 0 || d > 0 && d < time.Millisecond {
			return wrap(s.fail(f.at, "--%s needs a time of at least a millisecond, such as 500ms, 10s or 1m30s", f.name))
		}
		switch f.name {
		case "interval":
			h.Interval = d
		case "timeout":
			h.Timeout = d
		case "start-period":
			h.StartPeriod = d
		}
	}
	at := s.at
	kind, _, _ := strings.Cut(strings.ReplaceAll(s.rest(), "\t", " "), " ")
	s.at += len(kind)
	switch strings.ToUpper(kind) {
	case "NONE":
		if len(flags) > 0 || s.rest() != "" {
			return wrap(s.fail(at, "HEALTHCHECK NONE takes no arguments"))
		}
		h.None = true
	case "CMD":
		c, fail := command(s, "HEALTHCHECK CMD")
		if fail != nil {
			return fail
		}
		h.Command = c
	default:
		return wrap(s.fail(at, "HEALTHCHECK needs CMD and a command, or NONE"))
	}
	if p.recipe.HealthCheck != nil {
		return &failure{Error: &Error{pos, "a second HEALTHCHECK; the first is at " + p.recipe.HealthCheck.Pos.String()}}
	}
	p.recipe.HealthCheck = h
	return nil
}

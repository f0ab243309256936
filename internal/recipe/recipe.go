// Package recipe reads recipes, the texts that templates are built from.
//
// The language is a subset of the Dockerfile's (Docker's "Dockerfile
// reference", whose rules hold for what is in it) and two instructions more,
// START and LIMIT. docs/recipes.md describes it. What a Dockerfile has and a recipe has
// not is refused with its place and what to write instead, never passed over.
//
// BuildKit's own parser (github.com/moby/buildkit/frontend/dockerfile) is not
// used: it gives places as lines alone, since it joins continued lines before
// it looks at them; it leaves unknown instructions, flags and forms to later
// layers; and its packages need 35 others, protobuf's among them, to read a
// language of nine instructions. The tests hold this parser to the meanings
// that BuildKit's has.
package recipe

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// MaxSize bounds a recipe's text, in bytes.
const MaxSize = 1 << 20

// Position is a place in a recipe's text.
type Position struct {
	Line   int // from 1
	Column int // in characters, from 1
}

func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Line, p.Column) }

// Error says what is wrong at one place of a recipe.
type Error struct {
	Pos     Position
	Message string
}

func (e *Error) Error() string { return e.Pos.String() + ": " + e.Message }

// Errors are what is wrong with a recipe, one for each instruction at most, in
// the order of the text. Parse returns no other error, and no more than a hundred.
type Errors []*Error

const maxErrors = 100

func (e Errors) Error() string {
	var lines []string
	for _, err := range e {
		lines = append(lines, err.Error())
	}
	return strings.Join(lines, "\n")
}

// Recipe is a recipe that was read.
type Recipe struct {
	From  From
	Steps []Step
	// Start is left running when the template is captured, and HealthCheck
	// says when it is ready for that. Wherever they stand in the text, both see
	// what the last step left. Nil: there is none.
	Start       *Start
	HealthCheck *HealthCheck
	// Limit bounds what the template's sandboxes use of their host. The build's
	// own sandbox has the limits of what the recipe starts from. Nil: there is none.
	Limit *Limit
}

// String is the recipe in a form without comments and choices: Parse makes the
// same recipe of it, positions aside, and of that String makes the same text.
func (r *Recipe) String() string {
	var b strings.Builder
	fmt.Fprintln(&b, r.From)
	for _, s := range r.Steps {
		fmt.Fprintln(&b, s)
	}
	if r.Limit != nil {
		fmt.Fprintln(&b, r.Limit)
	}
	if r.Start != nil {
		fmt.Fprintln(&b, r.Start)
	}
	if r.HealthCheck != nil {
		fmt.Fprintln(&b, r.HealthCheck)
	}
	return b.String()
}

// From is what a template starts from: another template or an OCI image.
type From struct {
	Pos      Position
	Template string // empty: Image
	Tag      string // of Template; may be empty
	Image    string // the OCI image's reference, as it was written
}

func (f From) String() string {
	switch {
	case f.Image != "":
		return "FROM " + imageScheme + f.Image
	case f.Tag != "":
		return "FROM " + f.Template + ":" + f.Tag
	}
	return "FROM " + f.Template
}

// Step is one of *Run, *Env, *Copy, *Workdir and *User. Its String is the
// canonical text of the instruction, one line without its end.
type Step interface {
	Position() Position
	String() string
}

// Command is a command in one of its two forms.
type Command struct {
	Shell string   // for /bin/sh -c, as it was written but for joined lines
	Exec  []string // program and arguments; nil: Shell
}

// Args is the command's program and arguments.
func (c Command) Args() []string {
	if c.Exec != nil {
		return c.Exec
	}
	return []string{"/bin/sh", "-c", c.Shell}
}

func (c Command) String() string {
	if c.Exec == nil {
		return c.Shell
	}
	return array(c.Exec)
}

// Run runs a command. Variables in it are the shell's business.
type Run struct {
	Pos     Position
	Command Command
}

// Position is where the instruction begins.
func (s *Run) Position() Position { return s.Pos }

func (s *Run) String() string { return "RUN " + s.Command.String() }

// Env sets variables for the steps that follow and for the template. All
// values see the variables as they are before the instruction.
type Env struct {
	Pos  Position
	Vars []Var
}

// Var is one variable of an Env.
type Var struct {
	Name  string
	Value Word
}

// Position is where the instruction begins.
func (s *Env) Position() Position { return s.Pos }

func (s *Env) String() string {
	var b strings.Builder
	b.WriteString("ENV")
	for _, v := range s.Vars {
		b.WriteString(" " + v.Name + "=" + v.Value.String())
	}
	return b.String()
}

// Copy copies files and folders of the build's context. Sources are patterns
// (path.Match) below the context's root; with several, or a pattern, Target is
// a folder.
type Copy struct {
	Pos     Position
	Sources []Word
	Target  Word
	Owner   *Word   // "user", "user:group", names or numbers; nil: root
	Mode    *uint32 // permission bits, setuid, setgid and sticky as chmod(2) has them; nil: the files' own
}

// Position is where the instruction begins.
func (s *Copy) Position() Position { return s.Pos }

func (s *Copy) String() string {
	var b strings.Builder
	b.WriteString("COPY")
	if s.Mode != nil {
		fmt.Fprintf(&b, " --chmod=%04o", *s.Mode)
	}
	if s.Owner != nil {
		b.WriteString(" --chown=" + s.Owner.String())
	}
	for _, w := range s.Sources {
		b.WriteString(" " + w.String())
	}
	b.WriteString(" " + s.Target.String())
	return b.String()
}

// Workdir sets, and makes, the working directory. A relative one starts from
// the one before.
type Workdir struct {
	Pos  Position
	Path Word
}

// Position is where the instruction begins.
func (s *Workdir) Position() Position { return s.Pos }

func (s *Workdir) String() string { return "WORKDIR " + s.Path.String() }

// User sets who the following commands, and the template's, run as.
type User struct {
	Pos  Position
	Name Word // "user" or "user:group", names or numbers
}

// Position is where the instruction begins.
func (s *User) Position() Position { return s.Pos }

func (s *User) String() string { return "USER " + s.Name.String() }

// Limit bounds what each sandbox uses of its host's disk and network per second. The
// keys of Limits are those of [MinLimits]; 0 removes a limit of the recipe's base.
type Limit struct {
	Pos    Position
	Limits map[string]int64
}

// MinLimits has the names of all limits, each with the least that a guest works with.
var MinLimits = map[string]int64{
	"disk_bytes":  1 << 20,  // read and written, together
	"disk_ops":    50,       // reads and writes, together
	"net_bytes":   64 << 10, // in each direction
	"net_packets": 100,      // in each direction
}

// MaxLimit is the largest limit.
const MaxLimit = 10_000_000_000

func (l *Limit) String() string {
	var b strings.Builder
	b.WriteString("LIMIT")
	for _, name := range slices.Sorted(maps.Keys(l.Limits)) {
		fmt.Fprintf(&b, " %s=%d", name, l.Limits[name])
	}
	return b.String()
}

// Start is a command that is left running.
type Start struct {
	Pos     Position
	Command Command
}

func (s *Start) String() string { return "START " + s.Command.String() }

// HealthCheck says how to find out that what was started is ready. Zeros stand
// for the Dockerfile's defaults: 30 s, 30 s, 0 s, 3.
type HealthCheck struct {
	Pos         Position
	None        bool // not even the one that the base brings
	Command     Command
	Interval    time.Duration // between two checks
	Timeout     time.Duration // of one check
	StartPeriod time.Duration // in which failures do not count
	Retries     int           // failures in a row that end the wait
}

func (h *HealthCheck) String() string {
	if h.None {
		return "HEALTHCHECK NONE"
	}
	var b strings.Builder
	b.WriteString("HEALTHCHECK")
	for _, o := range []struct {
		name  string
		value time.Duration
	}{{"interval", h.Interval}, {"timeout", h.Timeout}, {"start-period", h.StartPeriod}} {
		if o.value != 0 {
			fmt.Fprintf(&b, " --%s=%s", o.name, o.value)
		}
	}
	if h.Retries != 0 {
		fmt.Fprintf(&b, " --retries=%d", h.Retries)
	}
	b.WriteString(" CMD " + h.Command.String())
	return b.String()
}

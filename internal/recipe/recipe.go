// Package recipe parses recipes, the texts from which templates are built.
//
// The language is a subset of Dockerfiles, with the rules of Docker's "Dockerfile
// reference", and two more instructions, START and LIMIT. docs/recipes.md describes it. The
// parser refuses the rest of the Dockerfile language, with the position and what to write
// instead, and ignores nothing.
//
// It does not use BuildKit's parser (github.com/moby/buildkit/frontend/dockerfile), because
// that one reports only lines, since it joins continued lines first; it leaves unknown
// instructions, flags and forms to later layers; and its packages need 35 others, such as
// protobuf's, for a language of nine instructions. The tests compare this parser with
// BuildKit's.
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

// Position is a position in a recipe's text.
type Position struct {
	Line   int // from 1
	Column int // in characters, from 1
}

func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Line, p.Column) }

// Error is a mistake at one position of a recipe.
type Error struct {
	Pos     Position
	Message string
}

func (e *Error) Error() string { return e.Pos.String() + ": " + e.Message }

// Errors are the mistakes in a recipe, at most one per instruction and a hundred in all, in
// the order of the text. Parse returns no other error.
type Errors []*Error

const maxErrors = 100

func (e Errors) Error() string {
	var lines []string
	for _, err := range e {
		lines = append(lines, err.Error())
	}
	return strings.Join(lines, "\n")
}

// Recipe is a parsed recipe.
type Recipe struct {
	From  From
	Steps []Step
	// Start keeps running when the template is captured, and HealthCheck says when it is
	// ready for that. Wherever they are in the text, both run after the last step. Nil: none.
	Start       *Start
	HealthCheck *HealthCheck
	// Limit bounds how much the template's sandboxes use of their host. The build's own
	// sandbox has the limits of the recipe's base. Nil: none.
	Limit *Limit
}

// String returns the recipe in its canonical form. Parsing that gives the same recipe,
// except for positions, and so the same canonical form.
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
	Shell string   // for /bin/sh -c, as it was written, with lines joined
	Exec  []string // program and arguments; nil: Shell
}

// Args returns the command's program and arguments.
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

// Run runs a command. The shell expands variables in it.
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

// Workdir sets and creates the working directory. A relative path starts at the present
// one.
type Workdir struct {
	Pos  Position
	Path Word
}

// Position is where the instruction begins.
func (s *Workdir) Position() Position { return s.Pos }

func (s *Workdir) String() string { return "WORKDIR " + s.Path.String() }

// User sets the user of the following commands and of the template's processes.
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

// MinLimits has the names of all limits, each with the lowest value at which a guest works.
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

// Start is a command that keeps running.
type Start struct {
	Pos     Position
	Command Command
}

func (s *Start) String() string { return "START " + s.Command.String() }

// HealthCheck says how to check that the started command is ready. Zero fields have the
// defaults of Dockerfiles: 30 s, 30 s, 0 s, 3.
type HealthCheck struct {
	Pos         Position
	None        bool // no check, not even that of the base
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

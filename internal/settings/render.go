package settings

import (
	"fmt"
	"strings"
)

// Help returns the settings for a program's --help.
func (p Program) Help() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Settings are environment variables, or keys in the section %q of\n%s, where WRENN_LISTEN is %q. A variable\noverrides the file.\n", p.Name, File, "listen")
	for _, s := range p.Settings {
		fmt.Fprintf(&b, "\n  %s (%s)\n      %s\n", s.Name, strings.Join(s.facts(), ", "), s.Help)
	}
	return b.String()
}

// Markdown returns the settings as a table.
func (p Program) Markdown() string {
	var b strings.Builder
	b.WriteString("| variable | value | meaning |\n| --- | --- | --- |\n")
	for _, s := range p.Settings {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", s.Name, strings.Join(s.facts(), ", "), strings.ReplaceAll(s.Help, "|", `\|`))
	}
	return b.String()
}

// facts returns what a value looks like, and the default.
func (s Setting) facts() []string {
	facts := []string{s.Kind}
	switch {
	case s.Required:
		facts = append(facts, "required")
	case s.Default != "":
		facts = append(facts, "default "+s.Default)
	}
	return facts
}

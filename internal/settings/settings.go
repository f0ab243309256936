// Package settings reads a program's settings from its environment and from a settings
// file. Struct tags of its configuration declare them: env, envDefault and help.
package settings

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/agext/levenshtein"
	"github.com/caarlos0/env/v11"
	"go.yaml.in/yaml/v4"
)

// Setting describes one setting of a program, for the settings file, help and documentation.
type Setting struct {
	// Name is the environment variable.
	Name string
	// Kind says what a value looks like, such as "duration".
	Kind     string
	Default  string
	Required bool
	Help     string
}

// prefix begins the names of Wrenn's own variables.
const prefix = "WRENN_"

// Key returns the setting's key in the settings file.
func (s Setting) Key() string { return strings.ToLower(strings.TrimPrefix(s.Name, prefix)) }

// Program is a program that has settings. Its name is its section in the settings file.
type Program struct {
	Name     string
	Settings []Setting
}

// Of returns the settings that the tags of config, a struct or a pointer to one, declare.
func Of(config any) []Setting {
	t := reflect.TypeOf(config)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var all []Setting
	for f := range fields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("env"), ",")
		all = append(all, Setting{
			Name: name, Kind: kind(f.Type), Default: f.Tag.Get("envDefault"), Help: f.Tag.Get("help"),
			Required: slices.Contains(strings.Split(options, ","), "required"),
		})
	}
	return all
}

// fields yields the fields of t, and of nested structs, that are settings.
func fields(t reflect.Type) iter.Seq[reflect.StructField] {
	return func(yield func(reflect.StructField) bool) {
		for _, f := range reflect.VisibleFields(t) {
			switch tag, ok := f.Tag.Lookup("env"); {
			case ok && tag != "-":
				if !yield(f) {
					return
				}
			case !ok && !f.Anonymous && f.Type.Kind() == reflect.Struct:
				for inner := range fields(f.Type) {
					if !yield(inner) {
						return
					}
				}
			}
		}
	}
}

func kind(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t.Kind() == reflect.Slice:
		return "list"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case reflect.PointerTo(t).Implements(reflect.TypeFor[interface{ UnmarshalText([]byte) error }]()):
		return "text"
	case t.Kind() >= reflect.Int && t.Kind() <= reflect.Float64:
		return "number"
	}
	return "text"
}

// Default sets the zero fields of config, a pointer to a struct, to the defaults in
// their tags.
func Default(config any) {
	if err := env.ParseWithOptions(config, env.Options{Environment: map[string]string{}, SetDefaultsForZeroValuesOnly: true}); err != nil {
		panic(fmt.Sprintf("defaults of %T: %v", config, err)) // a tag is wrong
	}
}

// Values are settings by name.
type Values map[string]string

// File is the settings file, unless the variable [FileVariable] names another one.
const File = "/etc/wrenn/wrenn.yaml"

// FileVariable is the variable that names the settings file.
const FileVariable = "WRENN_CONFIG"

// Read returns the variables of environ and, where these do not set them, the
// settings in the program's section of the settings file. It also returns warnings
// about keys in that section that are not settings of the program.
func (p Program) Read(environ []string) (Values, []string, error) {
	values := Values{}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		values[name] = value
	}
	file, sections, err := readFile(values[FileVariable])
	if err != nil {
		return nil, nil, err
	}
	names := map[string]string{}
	for _, s := range p.Settings {
		names[s.Key()] = s.Name
	}
	delete(names, Setting{Name: FileVariable}.Key())
	var warnings []string
	for key, node := range sections[p.Name] {
		name := names[key]
		if name == "" {
			warnings = append(warnings, unknown(fmt.Sprintf("%s: %s.%s", file, p.Name, key), "setting", key, names))
			continue
		}
		value, err := scalar(node)
		if err != nil {
			return nil, nil, fmt.Errorf("read settings: %s: line %d: %s.%s: %w", file, node.Line, p.Name, key, err)
		}
		if _, ok := values[name]; !ok {
			values[name] = value
		}
	}
	slices.Sort(warnings)
	return values, warnings, nil
}

// readFile returns the name and the sections of the settings file. named is the value of
// [FileVariable]. If it is empty, the file is [File], which need not exist.
func readFile(named string) (file string, sections map[string]map[string]yaml.Node, err error) {
	file = cmp.Or(named, File)
	text, err := os.ReadFile(file)
	if err != nil && (named != "" || !errors.Is(err, fs.ErrNotExist)) {
		return "", nil, fmt.Errorf("read settings: %w", err)
	}
	if err := yaml.Unmarshal(text, &sections); err != nil {
		return "", nil, fmt.Errorf("read settings: %s: %w", file, err)
	}
	return file, sections, nil
}

// scalar returns a YAML value in the form that the environment would have.
func scalar(node yaml.Node) (string, error) {
	switch node.Kind {
	case yaml.ScalarNode:
		if node.Tag == "!!null" {
			return "", nil
		}
		return node.Value, nil
	case yaml.SequenceNode:
		var words []string
		for _, n := range node.Content {
			word, err := scalar(*n)
			if err != nil || n.Kind != yaml.ScalarNode {
				return "", errors.New("want a list of values")
			}
			words = append(words, word)
		}
		return strings.Join(words, ","), nil
	}
	return "", errors.New("want a value or a list of values")
}

// Parse sets the fields of config, a pointer to a struct. Settings that are not in v get
// the defaults of their tags.
func (v Values) Parse(config any) error {
	if err := env.ParseWithOptions(config, env.Options{Environment: v}); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	return nil
}

// Unknown returns a warning for each variable in environ whose name begins with
// WRENN_ and is not a setting of any of programs.
func Unknown(environ []string, programs ...Program) []string {
	names := map[string]string{}
	for _, p := range programs {
		for _, s := range p.Settings {
			names[s.Name] = s.Name
		}
	}
	var warnings []string
	for _, pair := range environ {
		name, _, _ := strings.Cut(pair, "=")
		if strings.HasPrefix(name, prefix) && names[name] == "" {
			warnings = append(warnings, unknown(name, "setting", name, names))
		}
	}
	slices.Sort(warnings)
	return warnings
}

// Misspelled returns a warning for each variable in environ that differs in one letter from
// the name of one of p's settings, or has two swapped, and is no setting of p or of others.
func (p Program) Misspelled(environ []string, others ...Program) []string {
	var warnings []string
	for _, pair := range environ {
		name, _, _ := strings.Cut(pair, "=")
		meant := map[string]string{}
		for _, s := range p.Settings {
			d := levenshtein.Distance(name, s.Name, nil)
			if d == 1 || d == 2 && slices.Equal(sorted(name), sorted(s.Name)) {
				meant[s.Name] = s.Name
			}
		}
		if len(meant) > 0 && len(Unknown([]string{pair}, append(slices.Clone(others), p)...)) > 0 {
			warnings = append(warnings, unknown(name, "setting", name, meant))
		}
	}
	slices.Sort(warnings)
	return warnings
}

func sorted(word string) []byte {
	b := []byte(word)
	slices.Sort(b)
	return b
}

// UnknownSections returns a warning for each section of the settings file that is not of
// any of programs. It ignores a file that cannot be read, which [Program.Read] reports.
func UnknownSections(environ []string, programs ...Program) []string {
	named := ""
	for _, pair := range environ {
		if value, ok := strings.CutPrefix(pair, FileVariable+"="); ok {
			named = value
		}
	}
	file, sections, err := readFile(named)
	if err != nil {
		return nil
	}
	names := map[string]string{}
	for _, p := range programs {
		names[p.Name] = p.Name
	}
	var warnings []string
	for section := range sections {
		if names[section] == "" {
			warnings = append(warnings, unknown(file+": "+section, "section", section, names))
		}
	}
	slices.Sort(warnings)
	return warnings
}

// unknown returns a warning that shown is not a setting or section, as kind says. It
// suggests the key of known that is closest to word.
func unknown(shown, kind, word string, known map[string]string) string {
	closest, least := "", max(2, len(word)/4)+1
	for k := range known {
		if d := levenshtein.Distance(word, k, nil); d < least || d == least && closest != "" && k < closest {
			closest, least = k, d
		}
	}
	if closest == "" {
		return fmt.Sprintf("%s is not a %s", shown, kind)
	}
	return fmt.Sprintf("%s is not a %s: did you mean %s?", shown, kind, closest)
}

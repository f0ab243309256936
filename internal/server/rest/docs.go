package rest

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"html"
	"html/template"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/getkin/kin-openapi/openapi3"
)

//go:embed docs.html
var docsPage string

// renderDocs makes a page of the OpenAPI document that needs nothing from elsewhere.
func renderDocs(spec *openapi3.T) ([]byte, error) {
	page, err := template.New("docs").Funcs(template.FuncMap{
		"text":   renderText,
		"schema": schemaName,
		"json": func(v any) (string, error) {
			b, err := json.MarshalIndent(v, "", "  ")
			return string(b), err
		},
	}).Parse(docsPage)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = page.Execute(&out, map[string]any{"Info": spec.Info, "Groups": groups(spec), "Schemas": schemas(spec)})
	return out.Bytes(), err
}

type docGroup struct {
	Name, Description string
	Operations        []docOperation
}

type docOperation struct {
	Method, Path string
	*openapi3.Operation
	Parameters []*openapi3.Parameter
	Bodies     []docBody
	Answers    []docAnswer
}

type docBody struct {
	Type     string
	Schema   *openapi3.SchemaRef
	Examples []any
}

type docAnswer struct {
	Status, Description string
	Bodies              []docBody
}

type docSchema struct {
	Name string
	*openapi3.Schema
	Fields []docField
}

type docField struct {
	Name     string
	Required bool
	Ref      *openapi3.SchemaRef
}

func groups(spec *openapi3.T) []docGroup {
	var all []docGroup
	for _, tag := range spec.Tags {
		g := docGroup{Name: tag.Name, Description: tag.Description}
		for _, path := range spec.Paths.InMatchingOrder() {
			item := spec.Paths.Value(path)
			ops := item.Operations()
			for _, method := range slices.Sorted(maps.Keys(ops)) {
				op := ops[method]
				if !slices.Contains(op.Tags, tag.Name) {
					continue
				}
				d := docOperation{Method: method, Path: path, Operation: op}
				for _, p := range append(slices.Clone(item.Parameters), op.Parameters...) {
					d.Parameters = append(d.Parameters, p.Value)
				}
				if op.RequestBody != nil {
					d.Bodies = bodies(op.RequestBody.Value.Content)
				}
				answers := op.Responses.Map()
				for _, status := range slices.Sorted(maps.Keys(answers)) {
					a := answers[status].Value
					d.Answers = append(d.Answers, docAnswer{Status: status, Description: *a.Description, Bodies: bodies(a.Content)})
				}
				g.Operations = append(g.Operations, d)
			}
		}
		slices.SortStableFunc(g.Operations, func(a, b docOperation) int { return strings.Compare(a.Path, b.Path) })
		all = append(all, g)
	}
	return all
}

func bodies(content openapi3.Content) []docBody {
	var all []docBody
	for _, kind := range slices.Sorted(maps.Keys(content)) {
		m := content[kind]
		b := docBody{Type: kind, Schema: m.Schema}
		if m.Example != nil {
			b.Examples = append(b.Examples, m.Example)
		}
		for _, name := range slices.Sorted(maps.Keys(m.Examples)) {
			b.Examples = append(b.Examples, m.Examples[name].Value.Value)
		}
		all = append(all, b)
	}
	return all
}

func schemas(spec *openapi3.T) []docSchema {
	var all []docSchema
	for _, name := range slices.Sorted(maps.Keys(spec.Components.Schemas)) {
		s := spec.Components.Schemas[name].Value
		d := docSchema{Name: name, Schema: s}
		for _, field := range slices.Sorted(maps.Keys(s.Properties)) {
			d.Fields = append(d.Fields, docField{Name: field, Required: slices.Contains(s.Required, field), Ref: s.Properties[field]})
		}
		all = append(all, d)
	}
	return all
}

// schemaName says in a few words what a schema is, linking to named ones.
func schemaName(ref *openapi3.SchemaRef) template.HTML {
	if ref == nil || ref.Value == nil {
		return ""
	}
	if name, ok := strings.CutPrefix(ref.Ref, "#/components/schemas/"); ok {
		name = html.EscapeString(name)
		return template.HTML(fmt.Sprintf(`<a href="#schema-%s">%s</a>`, name, name))
	}
	s := ref.Value
	if s.Type == nil {
		return "any"
	}
	kind := strings.Join(s.Type.Slice(), " or ")
	if s.Format != "" {
		kind += " (" + s.Format + ")"
	}
	var notes []string
	if s.Min != nil {
		notes = append(notes, fmt.Sprintf("at least %g", *s.Min))
	}
	if s.Max != nil {
		notes = append(notes, fmt.Sprintf("at most %.0f", *s.Max))
	}
	if s.Default != nil {
		notes = append(notes, fmt.Sprintf("default %v", s.Default))
	}
	for _, e := range s.Enum {
		notes = append(notes, fmt.Sprint(e))
	}
	if len(notes) > 0 {
		kind += ": " + strings.Join(notes, ", ")
	}
	if s.Items != nil {
		return template.HTML("list of ") + schemaName(s.Items)
	}
	return template.HTML(html.EscapeString(kind))
}

var codeSpan = regexp.MustCompile("`([^`]+)`")

// renderText renders the little Markdown that descriptions use: paragraphs,
// lists, code.
func renderText(s string) template.HTML {
	var out strings.Builder
	for block := range strings.SplitSeq(strings.TrimSpace(s), "\n\n") {
		if block == "" {
			continue
		}
		escaped := codeSpan.ReplaceAllString(html.EscapeString(block), "<code>$1</code>")
		if items, ok := strings.CutPrefix(escaped, "- "); ok {
			out.WriteString("<ul><li>" + strings.ReplaceAll(items, "\n- ", "</li><li>") + "</li></ul>")
			continue
		}
		out.WriteString("<p>" + escaped + "</p>")
	}
	return template.HTML(out.String())
}

package client

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/wrenn-dev/wrenn/api"
)

// wire maps schemas to the types that requests are encoded from and responses are decoded
// into. A type used for several responses has the fields of all.
var wire = map[string]any{
	"CreateSandbox": CreateOptions{}, "Sandbox": Sandbox{}, "SandboxMetrics": Metrics{}, "MetricsPoint": MetricsPoint{}, "FileInfo": FileInfo{},
	"Template": Template{}, "TemplateLimits": TemplateLimits{}, "FailedImport": FailedImport{},
	"Build": Build{}, "BuildStep": BuildStep{}, "BuildEvent": BuildEvent{},
	"CodeResult": CodeResult{}, "CodeOutput": CodeOutput{}, "CodeError": CodeError{}, "CodeContext": CodeContext{},
	"Host": Host{}, "HostProblem": HostProblem{}, "HostRegistration": HostRegistration{},
	"Team": Team{}, "Member": Member{}, "Key CreatedKey": Key{},
	"Channel": Channel{}, "ChannelDelivery": Delivery{},
	"CreateBuild": BuildOptions{}, "ImportTemplate": importRequest{}, "RunCode": codeRequest{}, "NewKey": KeyOptions{}, "CreateChannel": ChannelOptions{}, "Login": Session{},
	"ExecRequest": execRequest{}, "ExecResult": execResult{},
	"ExecStreamStart": streamStart{}, "ExecStreamControl": streamControl{}, "ExecStreamEvent": streamEvent{},
	"AuditRecord": AuditRecord{}, "Usage": Usage{}, "UsageDay": UsageDay{}, "UsageAmount": UsageAmount{},
}

// omitted are the properties that the client does not have, with the reason.
var omitted = map[string]string{
	"RunCode.language":    "Python is the only language",
	"ExecStreamEvent.pid": "the stream controls the process",
}

// TestDocument checks that the client has the fields, the states, and the kinds and events
// of channels of the API document, and that each of its types with JSON names is compared.
func TestDocument(t *testing.T) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]bool)
	for _, name := range slices.Sorted(maps.Keys(wire)) {
		all := new(openapi3.Schema)
		for _, of := range strings.Fields(name) {
			schema := spec.Components.Schemas[of]
			if schema == nil {
				t.Fatalf("the document has no schema %s", of)
			}
			all.AllOf = append(all.AllOf, schema)
		}
		for _, fault := range differ(reflect.TypeOf(wire[name]), all, name) {
			t.Error(fault)
		}
		compared(reflect.TypeOf(wire[name]), seen)
	}
	for _, name := range encoded(t) {
		if !seen[name] {
			t.Errorf("%s has JSON names that this test does not compare with the document", name)
		}
	}
	for name, got := range map[string][]string{"SandboxState": States, "ChannelKind": ChannelKinds, "ChannelEvent": ChannelEvents} {
		var want []string
		for _, s := range spec.Components.Schemas[name].Value.Enum {
			want = append(want, s.(string))
		}
		slices.Sort(want)
		if got := slices.Sorted(slices.Values(got)); !slices.Equal(got, want) {
			t.Errorf("%s is %q in the client, and %q in the document", name, got, want)
		}
	}
}

// differ returns the differences between a type and a schema.
func differ(typ reflect.Type, schema *openapi3.Schema, at string) (faults []string) {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice && schema.Type.Is("array") {
		if typ.Kind() == reflect.Slice {
			schema, at = schema.Items.Value, at+"[]"
		}
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() {
		return nil
	}
	properties := make(openapi3.Schemas)
	collect(schema, properties)
	fields := make(map[string]reflect.Type)
	jsonFields(typ, fields)
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		if fields[name] == nil {
			if omitted[at+"."+name] != "" {
				continue
			}
			faults = append(faults, fmt.Sprintf("%s: %v lacks %q", at, typ, name))
			continue
		}
		faults = append(faults, differ(fields[name], properties[name].Value, at+"."+name)...)
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if properties[name] == nil {
			faults = append(faults, fmt.Sprintf("%s: %v has %q, which the document lacks", at, typ, name))
		}
	}
	return faults
}

// jsonFields adds the fields of a type and of the structs that it embeds, by JSON name.
func jsonFields(typ reflect.Type, fields map[string]reflect.Type) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			jsonFields(f.Type, fields)
		case name != "-" && f.IsExported():
			fields[cmp.Or(name, f.Name)] = f.Type
		}
	}
}

// compared adds the names of a type and of the types of its fields.
func compared(typ reflect.Type, names map[string]bool) {
	switch typ.Kind() {
	case reflect.Pointer, reflect.Slice:
		compared(typ.Elem(), names)
	case reflect.Struct:
		if names[typ.Name()] && typ.Name() != "" {
			return
		}
		names[typ.Name()] = true
		for i := range typ.NumField() {
			compared(typ.Field(i).Type, names)
		}
	}
}

// encoded returns the names of the package's types that have fields with JSON names.
func encoded(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			types, ok := decl.(*ast.GenDecl)
			if !ok || types.Tok != token.TYPE {
				continue
			}
			for _, spec := range types.Specs {
				of, ok := spec.(*ast.TypeSpec).Type.(*ast.StructType)
				if ok && slices.ContainsFunc(of.Fields.List, func(f *ast.Field) bool { return f.Tag != nil && !strings.Contains(f.Tag.Value, `"-"`) }) {
					names = append(names, spec.(*ast.TypeSpec).Name.Name)
				}
			}
		}
	}
	return names
}

// collect adds the properties of a schema and of the schemas that it refers to.
func collect(schema *openapi3.Schema, properties openapi3.Schemas) {
	maps.Copy(properties, schema.Properties)
	for _, part := range slices.Concat(schema.AllOf, schema.AnyOf, schema.OneOf) {
		collect(part.Value, properties)
	}
}

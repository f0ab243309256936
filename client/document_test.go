package client

import (
	"fmt"
	"maps"
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
	"AuditRecord": AuditRecord{}, "Usage": Usage{}, "UsageDay": UsageDay{}, "UsageAmount": UsageAmount{},
}

// TestDocument checks that the client has the fields, the states, and the kinds and events
// of channels of the API document.
func TestDocument(t *testing.T) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
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
	for _, f := range reflect.VisibleFields(typ) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" || name == "-" || !f.IsExported() {
			continue
		}
		if name == "" {
			name = f.Name
		}
		fields[name] = f.Type
	}
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		if fields[name] == nil {
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

// collect adds the properties of a schema and of the schemas that it refers to.
func collect(schema *openapi3.Schema, properties openapi3.Schemas) {
	maps.Copy(properties, schema.Properties)
	for _, part := range slices.Concat(schema.AllOf, schema.AnyOf, schema.OneOf) {
		collect(part.Value, properties)
	}
}

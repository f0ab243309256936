// Package api carries the public API's OpenAPI document.
package api

import _ "embed"

// OpenAPI is openapi.yaml: routes, schemas and errors of the public REST API.
//
//go:embed openapi.yaml
var OpenAPI []byte

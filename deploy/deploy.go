// Package deploy carries what a service is deployed with, for the program to
// use the same.
package deploy

import _ "embed"

// Caddyfile is the front door's configuration. It lists the environment
// variables that it reads.
//
//go:embed Caddyfile
var Caddyfile []byte

// Package deploy has the files that deploy a service, so that the program uses the same
// ones.
package deploy

import _ "embed"

// Caddyfile is the front door's configuration. It lists the environment
// variables that it reads.
//
//go:embed Caddyfile
var Caddyfile []byte

// Package deploy carries what a service is deployed with, for the program to
// use the same.
package deploy

import _ "embed"

// Caddyfile is the front door's configuration. It reads from its environment:
// WRENN_PORT, WRENN_BIND (addresses, separated by spaces), WRENN_DOMAIN and
// WRENN_SERVER (as Caddy names it: unix//path or host:port).
//
//go:embed Caddyfile
var Caddyfile []byte

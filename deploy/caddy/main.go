// Command caddy is the front door: Caddy with the modules that Wrenn's
// Caddyfile uses. Its version is pinned in this module's go.mod.
package main

import (
	"os"
	"strings"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
)

func main() {
	unsetEmpty()
	caddycmd.Main()
}

// unsetEmpty makes empty settings, such as a line "WRENN_SANDBOX_DOMAIN=" in caddy.env,
// mean the Caddyfile's defaults. Caddy uses those for unset variables only.
func unsetEmpty() {
	for _, setting := range os.Environ() {
		if name, value, _ := strings.Cut(setting, "="); value == "" && strings.HasPrefix(name, "WRENN_") {
			_ = os.Unsetenv(name)
		}
	}
}

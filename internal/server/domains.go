package server

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"golang.org/x/net/publicsuffix"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

var domainName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)

// setDomains validates the domains. SandboxDomain defaults to Domain.
func (c *Config) setDomains() error {
	c.Domain = netaddr.Hostname(c.Domain)
	if c.SandboxDomain == "" {
		c.SandboxDomain = c.Domain
		return nil
	}
	name := strings.ToLower(strings.TrimSuffix(c.SandboxDomain, "."))
	if !domainName.MatchString(name) {
		return fmt.Errorf("WRENN_SANDBOX_DOMAIN %q is not a domain like sandboxes.example.net", c.SandboxDomain)
	}
	c.SandboxDomain = name
	if name == c.Domain {
		return nil
	}
	public, err := url.Parse(c.PublicURL)
	if err != nil {
		return fmt.Errorf("read WRENN_PUBLIC_URL: %w", err)
	}
	service := netaddr.Hostname(public.Host)
	if service == name || strings.HasSuffix(service, "."+name) {
		return fmt.Errorf("WRENN_SANDBOX_DOMAIN: all names below %s belong to sandboxes, so the service cannot use %s: choose another domain", name, service)
	}
	if site, err := publicsuffix.EffectiveTLDPlusOne(service); err == nil && strings.HasSuffix("."+name, "."+site) {
		c.Log.Warn("WRENN_SANDBOX_DOMAIN belongs to the service's own site, so pages of guests can set cookies for both", "site", site)
	}
	return nil
}

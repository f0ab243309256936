package auth

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Role is a caller's relation to the object of a call.
type Role string

// The roles, from least to most: any caller, a logged-in user, members of a team in three
// ranks (each includes the ones before it), and the platform's admins.
const (
	Anybody  Role = "none"
	User     Role = "user"
	Member   Role = "member"
	Admin    Role = "admin"
	Owner    Role = "owner"
	Platform Role = "platform"
)

// ranks orders the roles in a team.
var ranks = map[Role]int{Member: 1, Admin: 2, Owner: 3}

// OfTeam reports whether r is a role in a team.
func (r Role) OfTeam() bool { return ranks[r] > 0 }

// AtLeast reports whether the team role r includes the rights of other.
func (r Role) AtLeast(other Role) bool { return ranks[r] >= ranks[other] }

// Scope limits what an API key may do.
type Scope string

// The scopes of API keys. A key without scopes has all rights of its team. Rights of the
// platform's admins need the scope platform.
const (
	Sandboxes     Scope = "sandboxes"
	Templates     Scope = "templates"
	ReadOnly      Scope = "read-only"
	PlatformScope Scope = "platform"
)

// Principal is the authenticated caller of a request.
type Principal struct {
	// Team is the team that the caller acts for (zero: none), Role the caller's role in
	// it. Keys have no role.
	Team uuid.UUID
	Role Role
	// Payer is whose limits the team's use counts towards: the team's owner, with all
	// their teams, or the team itself if it has no owner.
	Payer uuid.UUID
	// Key is the API key that authenticated the request, with its Scopes.
	Key    uuid.UUID
	Scopes []Scope
	// User is the logged-in user, in this Session. For a key, User is who created it.
	User, Session uuid.UUID
	Email         string
	// Platform reports an admin of the platform. For a key: an admin created it with the
	// scope platform.
	Platform bool

	// epoch counts the revocations of the user's rights. joined is when they
	// joined the team; keys of a member who leaves are deleted.
	epoch  int32
	joined time.Time
}

// since returns an error unless the caller kept their rights without interruption from p
// until now. A revocation counts even if it was undone.
func (p Principal) since(now Principal) error {
	rejoined := p.Team == now.Team && !p.joined.Equal(now.joined)
	if p.epoch != now.epoch || rejoined {
		return fault.New(fault.Unauthenticated, "access was revoked: authenticate again")
	}
	return nil
}

// HasKey reports whether an API key authenticated the caller.
func (p Principal) HasKey() bool { return p.Key != uuid.Nil }

// ID returns the id of the API key, or of the logged-in user.
func (p Principal) ID() uuid.UUID {
	if p.HasKey() {
		return p.Key
	}
	return p.User
}

// CanWrite reports whether the caller may change the team's objects. Callers who may not
// must not see credentials either.
func (p Principal) CanWrite() bool { return !slices.Contains(p.Scopes, ReadOnly) }

// InScope reports whether the caller's scopes include s.
func (p Principal) InScope(s Scope) bool {
	limited := slices.Contains(p.Scopes, Sandboxes) || slices.Contains(p.Scopes, Templates)
	return !limited || slices.Contains(p.Scopes, s)
}

// Rate is a class of operations that share a limit of calls per minute.
type Rate string

// The classes: reads, changes, operations that take memory or disk of a host, and
// operations that send something elsewhere.
const (
	RateRead      Rate = "read"
	RateChange    Rate = "change"
	RateExpensive Rate = "expensive"
	RateOutgoing  Rate = "outgoing"
)

// Access is what an operation requires of its caller.
type Access struct {
	// Role is the least role of a logged-in user. For team roles, it is the role in the
	// team that they act for.
	Role Role
	// Scopes lists the scopes of which an API key needs one. Without any, keys are
	// refused.
	Scopes []Scope
	// Read reports that the operation changes nothing, so read-only keys may call it.
	Read bool
	// Rate is the operation's class for rate limits.
	Rate Rate
}

// ParseAccess parses an operation's x-wrenn-access:
//
//	{role: member, scopes: [sandboxes], read: true, rate: read}
//
// role is required. Operations that only read have the rate read; the default of all
// others is expensive. Scopes of a team need a role of a team, and the scope platform
// needs the role platform.
func ParseAccess(v any) (Access, error) {
	var a Access
	fields, ok := v.(map[string]any)
	if !ok {
		return a, errors.New("x-wrenn-access is missing: say {role: none|user|member|admin|owner|platform, scopes: [sandboxes, templates], read: true, rate: read|change|expensive|outgoing}")
	}
	for name, v := range fields {
		switch name {
		case "role":
			text, _ := v.(string)
			a.Role = Role(text)
		case "scopes":
			list, ok := v.([]any)
			if !ok || len(list) == 0 {
				return a, errors.New("x-wrenn-access: scopes must be a list, or absent")
			}
			for _, s := range list {
				text, _ := s.(string)
				a.Scopes = append(a.Scopes, Scope(text))
			}
		case "rate":
			text, _ := v.(string)
			a.Rate = Rate(text)
		case "read":
			a.Read, ok = v.(bool)
			if !ok {
				return a, errors.New("x-wrenn-access: read must be true or false")
			}
		default:
			return a, fmt.Errorf("x-wrenn-access: unknown field %q", name)
		}
	}
	switch a.Role {
	case Anybody, User, Member, Admin, Owner, Platform:
	default:
		return a, fmt.Errorf("x-wrenn-access: unknown role %q", a.Role)
	}
	if a.Rate == "" {
		a.Rate = RateExpensive
		if a.Read {
			a.Rate = RateRead
		}
	}
	switch a.Rate {
	case RateRead, RateChange, RateExpensive, RateOutgoing:
	default:
		return a, fmt.Errorf("x-wrenn-access: unknown rate %q", a.Rate)
	}
	if a.Read != (a.Rate == RateRead) {
		return a, fmt.Errorf("x-wrenn-access: rate %q does not go with read: %v", a.Rate, a.Read)
	}
	for _, s := range a.Scopes {
		ofTeam := s == Sandboxes || s == Templates
		if !ofTeam && s != PlatformScope {
			return a, fmt.Errorf("x-wrenn-access: unknown scope %q", s)
		}
		if ofTeam && !a.Role.OfTeam() || !ofTeam && a.Role != Platform {
			return a, fmt.Errorf("x-wrenn-access: scope %q does not go with role %q", s, a.Role)
		}
	}
	return a, nil
}

// Check fails with permission_denied if the caller has too few rights.
func (a Access) Check(p Principal) error {
	if a.Role == Anybody {
		return nil
	}
	if p.HasKey() {
		switch {
		case len(a.Scopes) == 0:
			return fault.New(fault.PermissionDenied, "API keys cannot do this: log in instead")
		case a.Role == Platform && !p.Platform:
			return fault.New(fault.PermissionDenied, "only the platform's admins may do this, with a key of the scope %q", PlatformScope)
		case a.Role != Platform && !slices.ContainsFunc(a.Scopes, p.InScope):
			return fault.New(fault.PermissionDenied, "the API key needs the scope %q", a.Scopes[0])
		case !a.Read && !p.CanWrite():
			return fault.New(fault.PermissionDenied, "the API key may only read")
		}
		return nil
	}
	switch {
	case a.Role == Platform && !p.Platform:
		return fault.New(fault.PermissionDenied, "only the platform's admins may do this")
	case a.Role.OfTeam() && p.Team == uuid.Nil:
		return fault.New(fault.PermissionDenied, "you are not in a team")
	case a.Role.OfTeam() && !p.Role.AtLeast(a.Role):
		return fault.New(fault.PermissionDenied, "your role in the team is %s, but this needs %s", p.Role, a.Role)
	}
	return nil
}

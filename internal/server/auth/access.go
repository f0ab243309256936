package auth

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Role is what somebody may be to what a call is about.
type Role string

// The roles: of anybody, of who is logged in, of a team's members (each of
// whom may do what those before may), and of the platform's admins.
const (
	Anybody  Role = "none"
	User     Role = "user"
	Member   Role = "member"
	Admin    Role = "admin"
	Owner    Role = "owner"
	Platform Role = "platform"
)

// ranks orders the roles of a team.
var ranks = map[Role]int{Member: 1, Admin: 2, Owner: 3}

// OfTeam says whether the role is one in a team.
func (r Role) OfTeam() bool { return ranks[r] > 0 }

// AtLeast says whether who has role r in a team may do what other may.
func (r Role) AtLeast(other Role) bool { return ranks[r] >= ranks[other] }

// Scope is what an API key is for.
type Scope string

// The scopes of API keys. A key with none of them may do whatever a team's key
// can. What the platform's admins may takes a key that says so.
const (
	Sandboxes     Scope = "sandboxes"
	Templates     Scope = "templates"
	ReadOnly      Scope = "read-only"
	PlatformScope Scope = "platform"
)

// Principal is who calls.
type Principal struct {
	// Team is whose sandboxes the caller acts on, Role what they are in it;
	// zero for somebody without a team. Keys have no role.
	Team uuid.UUID
	Role Role
	// Payer says whose limits the team's use counts towards: the team's owner, with all
	// of their teams, or the team itself if it has no owner.
	Payer uuid.UUID
	// Key is the API key that was shown, Scopes what it is for.
	Key    uuid.UUID
	Scopes []Scope
	// User is who is logged in, in which session; for a key, who made it.
	User, Session uuid.UUID
	Email         string
	// Platform says that the user is one of the platform's admins; of a key, that
	// one made it for what admins do.
	Platform bool

	// epoch counts the revocations of the user's rights. joined is when they
	// joined the team; keys of a member who leaves are deleted.
	epoch  int32
	joined time.Time
}

// since returns an error unless the caller has had their rights without a break
// from when they were p until now: a revocation counts even if it was undone.
func (p Principal) since(now Principal) error {
	rejoined := p.Team == now.Team && !p.joined.Equal(now.joined)
	if p.epoch != now.epoch || rejoined {
		return fault.New(fault.Unauthenticated, "access was revoked: authenticate again")
	}
	return nil
}

// HasKey says whether the caller showed an API key.
func (p Principal) HasKey() bool { return p.Key != uuid.Nil }

// ID returns the API key's id, or that of the user who is logged in.
func (p Principal) ID() uuid.UUID {
	if p.HasKey() {
		return p.Key
	}
	return p.User
}

// CanWrite says whether the caller may change what their team owns; who may
// not is not to be shown what opens doors to it either.
func (p Principal) CanWrite() bool { return !slices.Contains(p.Scopes, ReadOnly) }

// InScope says whether the caller may deal with what s stands for.
func (p Principal) InScope(s Scope) bool {
	limited := slices.Contains(p.Scopes, Sandboxes) || slices.Contains(p.Scopes, Templates)
	return !limited || slices.Contains(p.Scopes, s)
}

// Rate is a class of operations, of which somebody may call so many in a minute.
type Rate string

// The classes: operations that change nothing, those that do, those that take a
// host's memory or disk, and those that send something elsewhere.
const (
	RateRead      Rate = "read"
	RateChange    Rate = "change"
	RateExpensive Rate = "expensive"
	RateOutgoing  Rate = "outgoing"
)

// Access is what an operation asks of its caller.
type Access struct {
	// Role is the least that somebody who is logged in must be: in the team
	// that they act for, for roles of a team.
	Role Role
	// Scopes are what API keys may be for, any of them; none: keys are not taken.
	Scopes []Scope
	// Read says that nothing is changed, so that read-only keys do.
	Read bool
	// Rate is the operation's class.
	Rate Rate
}

// ParseAccess reads a document's x-wrenn-access:
//
//	{role: member, scopes: [sandboxes], read: true, rate: read}
//
// role is required, and what only reads is of the class read. An operation that
// does not say its class is expensive. Scopes go with a role of a team, and the
// scope platform with the role platform.
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

// Check fails with permission_denied where the caller may not.
func (a Access) Check(p Principal) error {
	if a.Role == Anybody {
		return nil
	}
	if p.HasKey() {
		switch {
		case len(a.Scopes) == 0:
			return fault.New(fault.PermissionDenied, "API keys cannot do this: log in")
		case a.Role == Platform && !p.Platform:
			return fault.New(fault.PermissionDenied, "only the platform's admins may do this, with a key of the scope %q", PlatformScope)
		case a.Role != Platform && !slices.ContainsFunc(a.Scopes, p.InScope):
			return fault.New(fault.PermissionDenied, "the API key is not for this: it needs the scope %q", a.Scopes[0])
		case !a.Read && !p.CanWrite():
			return fault.New(fault.PermissionDenied, "the API key may only read")
		}
		return nil
	}
	switch {
	case a.Role == Platform && !p.Platform:
		return fault.New(fault.PermissionDenied, "only the platform's admins may do this")
	case a.Role.OfTeam() && p.Team == uuid.Nil:
		return fault.New(fault.PermissionDenied, "you are in no team")
	case a.Role.OfTeam() && !p.Role.AtLeast(a.Role):
		return fault.New(fault.PermissionDenied, "your role in the team is %s, this needs %s", p.Role, a.Role)
	}
	return nil
}

package hosts

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// How long hosts' tokens hold.
const (
	RegistrationLasts = time.Hour
	tokenLasts        = time.Hour
)

// registrationPrefix is what registration tokens begin with.
const registrationPrefix = "wrnh_"

// issuer and audience are in every token of a host.
const (
	issuer   = "wrenn"
	audience = "wrenn-host"
)

// Specs is what a host is and what of it is in use, as its agent says.
type Specs struct {
	Version, VMM, Accelerator string
	CPUs                      int32
	MemoryBytes, DiskBytes    int64
	// CapacityMiB is what sandboxes may have together.
	CapacityMiB         int64
	Slots, NetworkBlock int32
	Sandboxes           int32
	UsedMemoryMiB       int64
	UsedVCPUs           int32
	DiskFreeBytes       int64
}

// Registration is what an agent registers with.
type Registration struct {
	// Token is the registration token.
	Token string
	// URL is where the agent listens.
	URL string
	Specs
	// Refresh is the SHA-256 of the refresh token that the agent made.
	Refresh []byte
	// CSR is the agent's signing request (PEM); empty where it wants no certificate.
	CSR []byte
}

// Credentials is what an agent gets.
type Credentials struct {
	Host uuid.UUID
	// Token is what the agent shows the control plane until Expires.
	Token   string
	Expires time.Time
	// AgentToken is what the control plane shows the agent.
	AgentToken string
	// Certificate is the host's leaf, Authority who signed it, both PEM; empty
	// where there is no authority.
	Certificate, Authority []byte
	// Heartbeat is how often the agent is to say that it is there.
	Heartbeat time.Duration
}

// Add makes a host that is to register itself, and the token that it may do so
// with, once and within an hour.
func (r *Registry) Add(ctx context.Context, name string, tags []string) (db.Host, string, error) {
	token, hash := newToken()
	until := time.Now().Add(RegistrationLasts)
	if tags == nil {
		tags = []string{}
	}
	row, err := r.Store.InsertHost(ctx, db.InsertHostParams{ID: uuid.New(), Name: name, Tags: tags, RegistrationHash: hash, RegistrationExpiresAt: &until})
	if err != nil {
		return row, "", fmt.Errorf("add host: %w", err)
	}
	return row, token, nil
}

// Renew makes another registration token for a host, whose credentials stay as
// they are until it is used.
func (r *Registry) Renew(ctx context.Context, host uuid.UUID) (db.Host, string, error) {
	token, hash := newToken()
	until := time.Now().Add(RegistrationLasts)
	row, err := r.Store.RenewHostRegistration(ctx, db.RenewHostRegistrationParams{ID: host, RegistrationHash: hash, RegistrationExpiresAt: &until})
	if errors.Is(err, store.ErrNoRows) {
		return row, "", fault.New(fault.NotFound, "no such host that registers itself")
	}
	if err != nil {
		return row, "", fmt.Errorf("renew host's registration: %w", err)
	}
	return row, token, nil
}

func newToken() (token string, hash []byte) {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	token = registrationPrefix + hex.EncodeToString(b[:])
	sum := sha256.Sum256([]byte(token))
	return token, sum[:]
}

// errUsed is told whatever is wrong with a registration token.
var errUsed = fault.New(fault.Unauthenticated, "the registration token is not valid: it is used once, within an hour")

// Enroll registers an agent. The token is good for one agent: the same agent,
// which is one that names the same refresh token, may repeat the call until it
// has used what it got.
func (r *Registry) Enroll(ctx context.Context, g Registration) (Credentials, error) {
	if !strings.HasPrefix(g.Token, registrationPrefix) {
		return Credentials{}, errUsed
	}
	if len(g.Refresh) != sha256.Size {
		return Credentials{}, fault.New(fault.InvalidArgument, "refresh_hash: want the SHA-256 of a token")
	}
	if err := r.checkURL(g.URL); err != nil {
		return Credentials{}, err
	}
	hash := sha256.Sum256([]byte(g.Token))
	var c Credentials
	err := r.Store.InTx(ctx, func(q *db.Queries) error {
		row, err := q.LockHostByRegistration(ctx, hash[:])
		if errors.Is(err, store.ErrNoRows) {
			return errUsed
		}
		if err != nil {
			return err
		}
		// Registered with this token before: RegistrationHash is cleared when what
		// came of it is used, PreviousHash is what marks it until then.
		if used := slices.Equal(row.PreviousHash, hash[:]); used && !slices.Equal(row.RefreshHash, g.Refresh) {
			return errUsed
		}
		row, err = q.RegisterHost(ctx, db.RegisterHostParams{
			ID: row.ID, URL: &g.URL, RefreshHash: g.Refresh, PreviousHash: hash[:], Version: g.Version, VMM: g.VMM, Accelerator: g.Accelerator, CPUs: g.CPUs,
			MemoryBytes: g.MemoryBytes, DiskBytes: g.DiskBytes, CapacityMib: g.CapacityMiB, Slots: g.Slots, NetworkBlock: g.NetworkBlock,
		})
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.ConstraintName == "hosts_url_key" {
			return fault.New(fault.Conflict, "another host has the URL %s", g.URL)
		}
		if err != nil {
			return err
		}
		if err := q.DropHostCertificates(ctx, row.ID); err != nil {
			return err
		}
		c, err = r.credentials(ctx, q, row, g.CSR)
		return err
	})
	if err != nil {
		return Credentials{}, wrap("register host", err)
	}
	r.Log.Info("host registered", "host_id", id.Format(id.Host, c.Host), "url", g.URL)
	if err := r.moved(ctx, c.Host); err != nil {
		r.Log.Warn("look at the hosts again", "error", err) // It is done before long.
	}
	return c, nil
}

// Renewal is what an agent refreshes its credentials with.
type Renewal struct {
	// Refresh is the refresh token, Next the SHA-256 of the one that the agent
	// made to follow it.
	Refresh string
	Next    []byte
	CSR     []byte
}

// RefreshCredentials gives an agent what follows its credentials. The refresh
// token that it shows is void then; shown again with another successor it was
// stolen, and the host is revoked, for nobody knows by whom. Shown again with
// the same one, the answer did not arrive.
func (r *Registry) RefreshCredentials(ctx context.Context, n Renewal) (Credentials, error) {
	if len(n.Next) != sha256.Size {
		return Credentials{}, fault.New(fault.InvalidArgument, "next_hash: want the SHA-256 of a token")
	}
	refused := fault.New(fault.Unauthenticated, "the refresh token is not valid: register the host again")
	if strings.HasPrefix(n.Refresh, registrationPrefix) {
		return Credentials{}, refused // Its hash may stand where the refresh token's before would.
	}
	hash := sha256.Sum256([]byte(n.Refresh))
	var c Credentials
	reused := false
	err := r.Store.InTx(ctx, func(q *db.Queries) error {
		row, err := q.LockHostByRefresh(ctx, hash[:])
		if errors.Is(err, store.ErrNoRows) {
			return refused
		}
		if err != nil {
			return err
		}
		switch {
		case slices.Equal(row.RefreshHash, hash[:]):
			if err := q.RotateHostRefresh(ctx, db.RotateHostRefreshParams{ID: row.ID, Next: n.Next}); err != nil {
				return err
			}
			if err := q.EndHostRegistration(ctx, row.ID); err != nil {
				return err
			}
		case !slices.Equal(row.RefreshHash, n.Next):
			// Committed, unlike what else fails.
			reused, c.Host = true, row.ID
			return revoke(ctx, q, row.ID)
		}
		c, err = r.credentials(ctx, q, row, n.CSR)
		return err
	})
	if err != nil {
		return Credentials{}, wrap("refresh host's credentials", err)
	}
	if reused {
		r.Log.Error("a refresh token was used twice: the host is revoked", "host_id", id.Format(id.Host, c.Host))
		// Even if the caller, who may be the thief, leaves.
		if err := r.moved(context.WithoutCancel(ctx), c.Host); err != nil {
			r.Log.Error("drop the connections of a revoked host", "host_id", id.Format(id.Host, c.Host), "error", err)
		}
		return Credentials{}, refused
	}
	return c, nil
}

// revoke voids all that a host has.
func revoke(ctx context.Context, q *db.Queries, host uuid.UUID) error {
	return errors.Join(q.RevokeHost(ctx, host), q.DropHostCertificates(ctx, host))
}

// wrap says what failed unless the caller is told anyway.
func wrap(doing string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// claims are what a host's token says.
type claims struct {
	jwt.RegisteredClaims
	Epoch int32 `json:"epoch"`
}

// credentials makes what a host gets.
func (r *Registry) credentials(ctx context.Context, q *db.Queries, row db.Host, csr []byte) (Credentials, error) {
	now := time.Now()
	c := Credentials{Host: row.ID, Expires: now.Add(tokenLasts), AgentToken: r.Tokens.Agent(row.ID, row.Epoch), Heartbeat: r.Heartbeat}
	var err error
	c.Token, err = jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer: issuer, Audience: jwt.ClaimStrings{audience}, Subject: id.Format(id.Host, row.ID),
			IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(c.Expires),
		},
		Epoch: row.Epoch,
	}).SignedString(r.Tokens.HostKey())
	if err != nil {
		return c, fmt.Errorf("sign host's token: %w", err)
	}
	address, tls := secure(*row.URL)
	if !tls {
		return c, nil
	}
	if r.Authority == nil {
		return c, fault.New(fault.Conflict, "the control plane has no certificate authority: it cannot call %s", *row.URL)
	}
	leaf, parsed, err := r.Authority.SignHost(csr, row.ID, address)
	if err != nil {
		return c, fault.Because(err, fault.InvalidArgument, "csr: %v", err)
	}
	if err := q.InsertHostCertificate(ctx, db.InsertHostCertificateParams{Serial: pki.Serial(parsed), HostID: row.ID, NotAfter: parsed.NotAfter}); err != nil {
		return c, err
	}
	if err := q.PruneHostCertificates(ctx, row.ID); err != nil {
		return c, err
	}
	c.Certificate, c.Authority = leaf, r.Authority.PEM()
	return c, nil
}

// checkURL says whether a host may be called at a URL: over TLS where there is
// an authority, else on this machine alone.
func (r *Registry) checkURL(text string) error {
	u, err := url.Parse(text)
	bad := func(why string) error { return fault.New(fault.InvalidArgument, "url: %s", why) }
	if err != nil {
		return bad("not a URL like https://192.0.2.1:7070")
	}
	if u.Scheme == "unix" {
		// Else whoever has a token could have the server call any socket of its machine.
		return bad("hosts that register themselves listen on an address: want https://address:port")
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil || port < 1 || port > 65535 || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil || u.Scheme+"://"+u.Host != text {
		return bad("want https://address:port and nothing else")
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		return bad("the control plane cannot call " + ip.String())
	}
	switch {
	case u.Scheme == "https" && r.Authority == nil:
		return bad("the control plane has no certificate authority (WRENN_CA_CERT, WRENN_CA_KEY): it can call hosts on its own machine only, over http")
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http":
		return bad("want https://address:port")
	case r.Authority != nil:
		return bad("hosts are called over TLS: want https://address:port")
	case !netaddr.Local(text):
		return bad("without a certificate authority hosts are called on this machine only")
	}
	return nil
}

// Beat takes an agent's word, shown its token, that it is there, and what of it
// is in use. It fails with unauthenticated for a host that was deleted or revoked.
func (r *Registry) Beat(ctx context.Context, token string, s Specs) (db.Host, error) {
	host, epoch, err := r.verify(token)
	if err != nil {
		return db.Host{}, err
	}
	row, err := r.Store.Vital.HostBeat(ctx, db.HostBeatParams{
		ID: host, Epoch: epoch, Version: s.Version, VMM: s.VMM, Accelerator: s.Accelerator, CPUs: s.CPUs, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes,
		CapacityMib: s.CapacityMiB, Slots: s.Slots, NetworkBlock: s.NetworkBlock,
		Sandboxes: s.Sandboxes, UsedMemoryMib: s.UsedMemoryMiB, UsedVcpus: s.UsedVCPUs, DiskFreeBytes: s.DiskFreeBytes,
	})
	if errors.Is(err, store.ErrNoRows) {
		return row, errNotHost
	}
	if err != nil {
		return row, fmt.Errorf("write heartbeat: %w", err)
	}
	return row, nil
}

// Leave takes an agent's word that it goes: nothing is waited for.
func (r *Registry) Leave(ctx context.Context, token string) error {
	host, epoch, err := r.verify(token)
	if err != nil {
		return err
	}
	n, err := r.Store.Vital.HostLeaves(ctx, db.HostLeavesParams{ID: host, Epoch: epoch})
	if err != nil {
		return fmt.Errorf("write that host leaves: %w", err)
	}
	if n == 0 {
		return errNotHost
	}
	r.Log.Info("host leaves", "host_id", id.Format(id.Host, host))
	return nil
}

var errNotHost = fault.New(fault.Unauthenticated, "the host's token is not valid")

// verify returns whose token it is.
func (r *Registry) verify(token string) (host uuid.UUID, epoch int32, err error) {
	var c claims
	_, err = jwt.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return r.Tokens.HostKey(), nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithIssuer(issuer), jwt.WithAudience(audience), jwt.WithExpirationRequired())
	if err != nil {
		return host, 0, fault.Because(err, fault.Unauthenticated, "%s", errNotHost.Message)
	}
	if host, err = id.Parse(id.Host, c.Subject); err != nil {
		return host, 0, errNotHost
	}
	return host, c.Epoch, nil
}

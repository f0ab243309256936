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

// Lifetimes of hosts' tokens.
const (
	RegistrationLasts = time.Hour
	tokenLasts        = time.Hour
)

// registrationPrefix begins every registration token.
const registrationPrefix = "wrnh_"

// issuer and audience are claims of every host token.
const (
	issuer   = "wrenn"
	audience = "wrenn-host"
)

// Specs is a host's size and use, as its agent reports them.
type Specs struct {
	Version, VMM, Accelerator string
	CPUs                      int32
	MemoryBytes, DiskBytes    int64
	// CapacityMiB is the memory for all sandboxes together.
	CapacityMiB         int64
	Slots, NetworkBlock int32
	Sandboxes           int32
	UsedMemoryMiB       int64
	UsedVCPUs           int32
	DiskFreeBytes       int64
}

// Registration is an agent's request to register.
type Registration struct {
	// Token is the registration token.
	Token string
	// URL is where the agent listens.
	URL string
	Specs
	// Refresh is the SHA-256 of the refresh token that the agent generated.
	Refresh []byte
	// CSR is the agent's certificate signing request (PEM); empty if it needs no
	// certificate.
	CSR []byte
}

// Credentials is the server's response to a registration or a refresh.
type Credentials struct {
	Host uuid.UUID
	// Token authenticates the agent to the control plane until Expires.
	Token   string
	Expires time.Time
	// AgentToken authenticates the control plane to the agent.
	AgentToken string
	// Certificate is the host's certificate, Authority that of its issuer, both PEM;
	// empty without an authority.
	Certificate, Authority []byte
	// Heartbeat is the interval at which the agent must report.
	Heartbeat time.Duration
}

// Add creates a host and returns a registration token for its agent, which is valid once
// and for [RegistrationLasts].
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

// Renew creates a new registration token for a host. The host's credentials stay valid
// until the token is used.
func (r *Registry) Renew(ctx context.Context, host uuid.UUID) (db.Host, string, error) {
	token, hash := newToken()
	until := time.Now().Add(RegistrationLasts)
	row, err := r.Store.RenewHostRegistration(ctx, db.RenewHostRegistrationParams{ID: host, RegistrationHash: hash, RegistrationExpiresAt: &until})
	if errors.Is(err, store.ErrNoRows) {
		return row, "", fault.New(fault.NotFound, "no such host, or it does not register itself")
	}
	if err != nil {
		return row, "", fmt.Errorf("renew host's registration: %w", err)
	}
	return row, token, nil
}

func newToken() (token string, hash []byte) {
	var b [32]byte
	_, _ = rand.Read(b[:]) // It never fails.
	token = registrationPrefix + hex.EncodeToString(b[:])
	sum := sha256.Sum256([]byte(token))
	return token, sum[:]
}

// errUsed is the only error for registration tokens, whatever is wrong with them.
var errUsed = fault.New(fault.Unauthenticated, "the registration token is not valid: a token can be used once, within an hour")

// Enroll registers an agent. Only one agent can use a token. The same agent, which the
// hash of its refresh token identifies, may repeat the call until it has used the
// credentials.
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
		// PreviousHash marks a used registration token until the agent uses the
		// credentials, which clears RegistrationHash.
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
		r.Log.Warn("reload hosts", "error", err) // The next refresh does it.
	}
	return c, nil
}

// Renewal is an agent's request for new credentials.
type Renewal struct {
	// Refresh is the current refresh token, Next the SHA-256 of its successor, which the
	// agent generated.
	Refresh string
	Next    []byte
	CSR     []byte
}

// RefreshCredentials exchanges an agent's refresh token for new credentials. If an agent
// repeats a call because the response was lost, it names the same successor. A second use
// with another successor means that somebody stole the token, so the host is revoked.
func (r *Registry) RefreshCredentials(ctx context.Context, n Renewal) (Credentials, error) {
	if len(n.Next) != sha256.Size {
		return Credentials{}, fault.New(fault.InvalidArgument, "next_hash: want the SHA-256 of a token")
	}
	refused := fault.New(fault.Unauthenticated, "the refresh token is not valid: register the host again")
	if strings.HasPrefix(n.Refresh, registrationPrefix) {
		return Credentials{}, refused // PreviousHash may be the hash of a registration token.
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
			// Return nil, so that the revocation is committed.
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
		r.Log.Error("refresh token used twice: host revoked", "host_id", id.Format(id.Host, c.Host))
		// Disconnect even if the caller, who may be the thief, cancels.
		if err := r.moved(context.WithoutCancel(ctx), c.Host); err != nil {
			r.Log.Error("drop the connections of a revoked host", "host_id", id.Format(id.Host, c.Host), "error", err)
		}
		return Credentials{}, refused
	}
	return c, nil
}

// revoke invalidates a host's credentials and certificates.
func revoke(ctx context.Context, q *db.Queries, host uuid.UUID) error {
	return errors.Join(q.RevokeHost(ctx, host), q.DropHostCertificates(ctx, host))
}

// wrap adds the operation to internal errors. Faults stay as they are.
func wrap(doing string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// claims is the content of a host's token.
type claims struct {
	jwt.RegisteredClaims
	Epoch int32 `json:"epoch"`
}

// credentials issues a host's token and certificate.
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

// checkURL rejects URLs at which the server must not call a host. It allows only TLS if
// there is an authority, and only this machine otherwise.
func (r *Registry) checkURL(text string) error {
	u, err := url.Parse(text)
	bad := func(why string) error { return fault.New(fault.InvalidArgument, "url: %s", why) }
	if err != nil {
		return bad("not a URL like https://192.0.2.1:7070")
	}
	if u.Scheme == "unix" {
		// Otherwise the holder of a token could make the server connect to any socket of
		// its machine.
		return bad("a host that registers itself must listen on an address: want https://address:port")
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
		return bad("the control plane has no certificate authority (WRENN_CA_CERT, WRENN_CA_KEY): it can only call hosts on its own machine, over http")
	case u.Scheme == "https":
		return nil
	case u.Scheme != "http":
		return bad("want https://address:port")
	case r.Authority != nil:
		return bad("the control plane calls hosts over TLS: want https://address:port")
	case !netaddr.Local(text):
		return bad("without a certificate authority, the control plane can only call hosts on its own machine")
	}
	return nil
}

// Beat records a heartbeat of the agent that the token identifies. It fails with
// unauthenticated if the host was deleted or revoked.
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

// Leave marks a host offline because its agent stops.
func (r *Registry) Leave(ctx context.Context, token string) error {
	host, epoch, err := r.verify(token)
	if err != nil {
		return err
	}
	n, err := r.Store.Vital.HostLeaves(ctx, db.HostLeavesParams{ID: host, Epoch: epoch})
	if err != nil {
		return fmt.Errorf("mark host offline: %w", err)
	}
	if n == 0 {
		return errNotHost
	}
	r.Log.Info("host went offline", "host_id", id.Format(id.Host, host))
	return nil
}

var errNotHost = fault.New(fault.Unauthenticated, "the host's token is not valid")

// verify returns the host and the epoch of a valid token.
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

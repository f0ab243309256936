package up

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/inplace"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

// account is a system user that a program runs as.
type account struct{ uid, gid int }

func lookup(name string) (account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, fmt.Errorf("find the system's user %s: %w", name, err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return account{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	return account{uid, gid}, err
}

// run makes cmd run as the account, in dir, and without this process's environment,
// which can have the server's secrets.
func (a account) run(cmd *exec.Cmd, dir string) {
	cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}}
}

// ownDir creates a folder to which only the account has access.
func (a account) ownDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chown(dir, a.uid, a.gid)
}

// postgres is the private PostgreSQL cluster. It needs no password, because its socket
// is in a folder that only root and the system's user postgres can enter.
type postgres struct {
	dir  string
	user account
}

func newPostgres(ctx context.Context, dir layout.Dir) (*postgres, error) {
	if _, err := programs.Postgres.Find(); err != nil {
		return nil, err
	}
	p := &postgres{dir: dir.Postgres()}
	var err error
	if p.user, err = lookup("postgres"); err != nil {
		return nil, err
	}
	if err := p.user.ownDir(p.dir); err != nil {
		return nil, fmt.Errorf("set up PostgreSQL: %w", err)
	}
	// Only works while the folder is empty. If it fails, inPlace reports it.
	_ = inplace.Set(p.dir)
	if _, err := os.Stat(filepath.Join(p.data(), "PG_VERSION")); err == nil {
		return p, nil
	}
	// Under a temporary name, so that a cluster whose creation was interrupted is not used.
	tmp := filepath.Join(p.dir, "data.new")
	if err := os.RemoveAll(tmp); err != nil {
		return nil, err
	}
	cmd := programs.InitDB.CommandContext(ctx, "-D", tmp, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
	p.user.run(cmd, p.dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("create PostgreSQL's cluster: %w: %s", err, out)
	}
	// Synced, so that a later start does not take a cluster in use for an interrupted one.
	if err := errors.Join(os.Rename(tmp, p.data()), atomicfile.Sync(p.dir)); err != nil {
		return nil, fmt.Errorf("create PostgreSQL's cluster: %w", err)
	}
	return p, nil
}

// postgresData is the name of the cluster in PostgreSQL's folder.
const postgresData = "data"

func (p *postgres) data() string { return filepath.Join(p.dir, postgresData) }

func (p *postgres) url(database string) string {
	return "postgres:///" + database + "?user=postgres&host=" + url.QueryEscape(p.dir)
}

func (p *postgres) program() program {
	return program{
		name: "PostgreSQL",
		command: func() *exec.Cmd {
			_ = p.makeRoom(spareMiB) // if this fails, PostgreSQL fails to start and says why
			cmd := programs.Postgres.Command("-D", p.data(), "-k", p.dir,
				"-c", "listen_addresses=", "-c", "unix_socket_permissions=0700", "-c", "max_connections=100",
				"-c", "wal_recycle=on", "-c", "wal_init_zero=on") // see reserve.go
			p.user.run(cmd, p.dir)
			return cmd
		},
		ready: func(ctx context.Context) error {
			return poll(ctx, func(ctx context.Context) error {
				conn, err := pgx.Connect(ctx, p.url("postgres"))
				if err != nil {
					return err
				}
				return conn.Close(ctx)
			})
		},
		quit: syscall.SIGINT, // "fast shutdown": ends sessions
	}
}

// ensureDatabase creates the database if it does not exist.
func (p *postgres) ensureDatabase(ctx context.Context, name string) error {
	conn, err := pgx.Connect(ctx, p.url("postgres"))
	if err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	defer conn.Close(ctx)
	var have bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name).Scan(&have); err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	if have {
		return nil
	}
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{name}.Sanitize()); err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	return nil
}

// redisServer is the private Redis, on a socket like PostgreSQL's.
type redisServer struct {
	dir  string
	user account
}

func newRedis(dir layout.Dir) (*redisServer, error) {
	if _, err := programs.Redis.Find(); err != nil {
		return nil, err
	}
	r := &redisServer{dir: dir.Redis()}
	var err error
	if r.user, err = lookup("redis"); err != nil {
		return nil, err
	}
	return r, r.user.ownDir(r.dir)
}

func (r *redisServer) socket() string { return filepath.Join(r.dir, "redis.sock") }

func (r *redisServer) url() string { return "unix://" + r.socket() }

func (r *redisServer) program() program {
	return program{
		name: "Redis",
		command: func() *exec.Cmd {
			cmd := programs.Redis.Command("--port", "0", "--unixsocket", r.socket(), "--unixsocketperm", "700",
				"--dir", r.dir, "--appendonly", "yes", "--save", "", "--daemonize", "no",
				// Redis may forget anything: whatever must last is in PostgreSQL.
				"--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru")
			r.user.run(cmd, r.dir)
			return cmd
		},
		ready: func(ctx context.Context) error {
			c := redis.NewClient(&redis.Options{Network: "unix", Addr: r.socket(), MaxRetries: -1})
			defer c.Close()
			return poll(ctx, func(ctx context.Context) error { return c.Ping(ctx).Err() })
		},
		quit: syscall.SIGTERM,
	}
}

// openTo lets the account connect to root's socket.
func openTo(a account, socket string) error {
	if err := os.Chown(socket, 0, a.gid); err != nil {
		return err
	}
	return os.Chmod(socket, 0o660)
}

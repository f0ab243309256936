-- +goose Up

ALTER TABLE users
    -- NULL: this user logs in only through another service.
    ALTER password_hash DROP NOT NULL,
    ADD active boolean NOT NULL DEFAULT true,
    -- When they verified their address. Before that they cannot log in.
    ADD verified_at timestamptz;
UPDATE users SET verified_at = created_at;
CREATE INDEX users_unverified ON users (created_at) WHERE verified_at IS NULL;
CREATE INDEX users_admins ON users (id) WHERE admin AND active AND verified_at IS NOT NULL;
-- For searches by prefix, whatever the database's collation.
CREATE INDEX users_email_prefix ON users (lower(email) text_pattern_ops);

-- Users' accounts at other services.
CREATE TABLE identities (
    provider   text NOT NULL,
    -- The service's own id of the account. Unlike a name, nobody else ever gets it.
    subject    text NOT NULL,
    user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, subject)
);
CREATE UNIQUE INDEX identities_user ON identities (user_id, provider);

-- One row per login, however often its refresh token was replaced.
CREATE TABLE sessions (
    id            uuid PRIMARY KEY,
    user_id       uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    -- SHA-256 of the valid refresh token, and of the one before it.
    refresh_hash  bytea NOT NULL,
    previous_hash bytea,
    rotated_at    timestamptz NOT NULL DEFAULT now(),
    created_at    timestamptz NOT NULL DEFAULT now(),
    -- Each use of the refresh token extends it, up to a limit.
    expires_at    timestamptz NOT NULL,
    user_agent    text NOT NULL,
    address       text NOT NULL
);
CREATE INDEX sessions_user ON sessions (user_id);
CREATE INDEX sessions_expiry ON sessions (expires_at);

-- Links that were mailed.
CREATE TABLE mail_tokens (
    -- SHA-256 of the token in the link.
    hash       bytea PRIMARY KEY,
    user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    purpose    text NOT NULL CHECK (purpose IN ('verify', 'reset')),
    expires_at timestamptz NOT NULL
);
CREATE INDEX mail_tokens_user ON mail_tokens (user_id, purpose);
CREATE INDEX mail_tokens_expiry ON mail_tokens (expires_at);

ALTER TABLE teams
    -- NULL: it exists. Nobody sees a team that is being deleted, with what it owns.
    ADD deleting_at timestamptz;
CREATE INDEX teams_age ON teams (created_at, id);
CREATE INDEX teams_deleting ON teams (deleting_at) WHERE deleting_at IS NOT NULL;

ALTER TABLE api_keys
    -- A set of "sandboxes", "templates", "read-only" and "platform". Empty: everything
    -- that a team's key may do.
    ADD scopes text[] NOT NULL DEFAULT '{}' CHECK (scopes <@ '{sandboxes,templates,read-only,platform}'),
    ADD expires_at timestamptz;
CREATE INDEX api_keys_user ON api_keys (user_id);
-- The installation's first key belongs to its operator.
UPDATE api_keys SET scopes = '{platform}' WHERE name = 'first' AND EXISTS (SELECT FROM users WHERE id = user_id AND admin);

-- The platform's settings, in one row. NULL means no limit.
CREATE TABLE platform_settings (
    id             boolean PRIMARY KEY DEFAULT true CHECK (id),
    signup_open    boolean NOT NULL DEFAULT false,
    -- The quota of teams without one of their own.
    max_running    integer DEFAULT 20 CHECK (max_running >= 0),
    max_vcpus      integer DEFAULT 40 CHECK (max_vcpus >= 0),
    max_memory_mib bigint DEFAULT 40960 CHECK (max_memory_mib >= 0),
    max_disk_mib   bigint DEFAULT 409600 CHECK (max_disk_mib >= 0)
);
INSERT INTO platform_settings DEFAULT VALUES;

-- Teams with a quota of their own.
CREATE TABLE team_quotas (
    team_id        uuid PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    max_running    integer CHECK (max_running >= 0),
    max_vcpus      integer CHECK (max_vcpus >= 0),
    max_memory_mib bigint CHECK (max_memory_mib >= 0),
    max_disk_mib   bigint CHECK (max_disk_mib >= 0)
);
-- Existing teams had no limits, and keep that.
INSERT INTO team_quotas (team_id) SELECT id FROM teams;

-- What a team uses now. The triggers below update it in the transaction that changes
-- sandboxes, whatever the statement. The row is also the lock under which quotas are
-- checked.
CREATE TABLE team_usage (
    team_id    uuid PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    running    integer NOT NULL,
    vcpus      integer NOT NULL,
    memory_mib bigint NOT NULL,
    disk_mib   bigint NOT NULL
);

-- What a sandbox counts: nothing once it has ended, only its disk while it is paused,
-- otherwise everything. A disk whose size only the host knows yet counts with the
-- default size.
-- +goose StatementBegin
CREATE FUNCTION sandbox_running(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('paused', 'stopped', 'error') THEN 0 ELSE 1 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE FUNCTION sandbox_disk(state text, disk_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('stopped', 'error') THEN 0 WHEN disk_mib = 0 THEN 5120 ELSE disk_mib END $$;
-- +goose StatementEnd

INSERT INTO team_usage
SELECT team_id, sum(sandbox_running(state)), sum(sandbox_running(state) * vcpus), sum(sandbox_running(state) * memory_mib), sum(sandbox_disk(state, disk_mib))
FROM sandboxes GROUP BY team_id;

-- Adds to a team's usage. With enforce, it fails with SQLSTATE WQ001 if the quota is
-- exceeded, and with WQ002 if the team is being deleted; the messages are for the
-- caller. Without enforce it records what has already happened.
-- +goose StatementBegin
CREATE FUNCTION charge_team(team uuid, add_running bigint, add_vcpus bigint, add_memory bigint, add_disk bigint, enforce boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    has team_usage;
    may record;
BEGIN
    INSERT INTO team_usage AS u VALUES (team, add_running, add_vcpus, add_memory, add_disk)
    ON CONFLICT (team_id) DO UPDATE SET running = u.running + EXCLUDED.running, vcpus = u.vcpus + EXCLUDED.vcpus,
        memory_mib = u.memory_mib + EXCLUDED.memory_mib, disk_mib = u.disk_mib + EXCLUDED.disk_mib
    RETURNING u.* INTO has;
    IF NOT enforce THEN
        RETURN;
    END IF;
    PERFORM FROM teams WHERE id = team AND deleting_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ002', MESSAGE = 'no such team';
    END IF;
    SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib INTO may FROM team_quotas WHERE team_id = team;
    IF NOT FOUND THEN
        SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib INTO may FROM platform_settings;
    END IF;
    IF add_running > 0 AND has.running > may.max_running THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('the team may run %s sandboxes at once: %s run, and %s more were asked for', may.max_running, has.running - add_running, add_running);
    ELSIF add_vcpus > 0 AND has.vcpus > may.max_vcpus THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('the team''s sandboxes may use %s virtual CPUs at once: %s are in use, and %s more were asked for', may.max_vcpus, has.vcpus - add_vcpus, add_vcpus);
    ELSIF add_memory > 0 AND has.memory_mib > may.max_memory_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('the team''s sandboxes may use %s MiB of memory at once: %s are in use, and %s more were asked for', may.max_memory_mib, has.memory_mib - add_memory, add_memory);
    ELSIF add_disk > 0 AND has.disk_mib > may.max_disk_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('the team''s sandboxes may have %s MiB of disk: they have %s, and %s more were asked for', may.max_disk_mib, has.disk_mib - add_disk, add_disk);
    END IF;
END $$;
-- +goose StatementEnd

-- Runs once per statement and charges teams in order, so that statements that change
-- many sandboxes do not deadlock.
-- +goose StatementBegin
CREATE FUNCTION sandboxes_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, true) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk
            FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, -t.running, -t.vcpus, -t.memory, -t.disk, false) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk
            FROM removed WHERE state NOT IN ('stopped', 'error') GROUP BY team_id ORDER BY team_id) t;
    ELSE
        -- Only a resume can be refused; other changes have already happened on hosts.
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.asked) FROM (
            SELECT n.team_id, bool_or(o.state = 'paused' AND n.state = 'resuming') AS asked, sum(sandbox_running(n.state) - sandbox_running(o.state)) AS running,
                sum(sandbox_running(n.state) * n.vcpus - sandbox_running(o.state) * o.vcpus) AS vcpus,
                sum(sandbox_running(n.state) * n.memory_mib - sandbox_running(o.state) * o.memory_mib) AS memory,
                sum(sandbox_disk(n.state, n.disk_mib) - sandbox_disk(o.state, o.disk_mib)) AS disk
            FROM removed o JOIN added n USING (id)
            WHERE (n.state, n.vcpus, n.memory_mib, n.disk_mib) IS DISTINCT FROM (o.state, o.vcpus, o.memory_mib, o.disk_mib)
            GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE (t.running, t.vcpus, t.memory, t.disk) IS DISTINCT FROM (0, 0, 0, 0);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_added AFTER INSERT ON sandboxes
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_charge();
CREATE TRIGGER sandboxes_changed AFTER UPDATE ON sandboxes
    REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_charge();
CREATE TRIGGER sandboxes_removed AFTER DELETE ON sandboxes
    REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_charge();

-- For the platform's admins, who see the sandboxes of every team.
CREATE INDEX sandboxes_age ON sandboxes (created_at DESC, id DESC);

-- +goose Down
DROP INDEX sandboxes_age;
DROP TRIGGER sandboxes_added ON sandboxes;
DROP TRIGGER sandboxes_changed ON sandboxes;
DROP TRIGGER sandboxes_removed ON sandboxes;
DROP FUNCTION sandboxes_charge, charge_team, sandbox_running, sandbox_disk;
DROP TABLE team_usage, team_quotas, platform_settings, mail_tokens, sessions, identities;
DROP INDEX api_keys_user, teams_age, teams_deleting, users_email_prefix, users_admins, users_unverified;
ALTER TABLE api_keys DROP scopes, DROP expires_at;
ALTER TABLE teams DROP deleting_at;
DELETE FROM users WHERE password_hash IS NULL;
ALTER TABLE users DROP active, DROP verified_at, ALTER password_hash SET NOT NULL;

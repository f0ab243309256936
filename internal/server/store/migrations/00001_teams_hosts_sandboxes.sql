-- +goose Up

CREATE TABLE users (
    id            uuid PRIMARY KEY,
    email         text NOT NULL,
    -- argon2id in PHC form.
    password_hash text NOT NULL,
    admin         boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now()
);
-- One account per address, whatever its case.
CREATE UNIQUE INDEX users_email ON users (lower(email));

CREATE TABLE teams (
    id         uuid PRIMARY KEY,
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
-- The platform itself, which owns the templates that every team sees.
INSERT INTO teams (id, name) VALUES ('00000000-0000-0000-0000-000000000000', 'platform');

CREATE TABLE team_members (
    team_id    uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    user_id    uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    role       text NOT NULL CHECK (role IN ('owner', 'admin', 'member')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, user_id)
);
CREATE INDEX team_members_user ON team_members (user_id);

CREATE TABLE api_keys (
    id           uuid PRIMARY KEY,
    team_id      uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    -- Its creator. The key outlives the user.
    user_id      uuid REFERENCES users ON DELETE SET NULL,
    name         text NOT NULL,
    -- Its first characters, to tell keys apart in a list.
    prefix       text NOT NULL,
    -- SHA-256 of the key. A salt is not needed, because the key is long and random.
    hash         bytea NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
CREATE UNIQUE INDEX api_keys_hash ON api_keys (hash);
CREATE INDEX api_keys_team ON api_keys (team_id, created_at DESC, id DESC);

CREATE TABLE hosts (
    id           uuid PRIMARY KEY,
    -- The address of its agent: "unix:/path" or "http://host:port".
    url          text NOT NULL UNIQUE,
    status       text NOT NULL CHECK (status IN ('pending', 'online', 'unreachable', 'draining', 'offline')),
    version      text NOT NULL DEFAULT '',
    vmm          text NOT NULL DEFAULT '',
    accelerator  text NOT NULL DEFAULT '',
    cpus         integer NOT NULL DEFAULT 0,
    memory_bytes bigint NOT NULL DEFAULT 0,
    disk_bytes   bigint NOT NULL DEFAULT 0,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz
);

CREATE TABLE templates (
    id         uuid PRIMARY KEY,
    team_id    uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    name       text NOT NULL,
    size_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL,
    UNIQUE (team_id, name)
);
-- Which host has a template's files.
CREATE TABLE host_templates (
    host_id     uuid NOT NULL REFERENCES hosts ON DELETE CASCADE,
    template_id uuid NOT NULL REFERENCES templates ON DELETE CASCADE,
    PRIMARY KEY (host_id, template_id)
);
CREATE INDEX host_templates_template ON host_templates (template_id);

CREATE TABLE sandboxes (
    id              uuid PRIMARY KEY,
    team_id         uuid NOT NULL REFERENCES teams,
    host_id         uuid REFERENCES hosts,
    -- No reference: a sandbox outlives the template that it started from.
    template_id     uuid NOT NULL,
    template_name   text NOT NULL,
    state           text NOT NULL CHECK (state IN ('pending', 'starting', 'running', 'stopping', 'stopped', 'error')),
    vcpus           integer NOT NULL,
    memory_mib      integer NOT NULL,
    disk_mib        integer NOT NULL,
    timeout_seconds integer NOT NULL,
    metadata        jsonb NOT NULL,
    created_at      timestamptz NOT NULL,
    started_at      timestamptz,
    expires_at      timestamptz,
    ended_at        timestamptz,
    end_reason      text CHECK (end_reason IN ('deleted', 'expired', 'exited', 'lost', 'failed')),
    error           text NOT NULL DEFAULT '',
    start_ms        bigint
);
CREATE INDEX sandboxes_team ON sandboxes (team_id, created_at DESC, id DESC);
-- Most rows are of ended sandboxes, but lists and the reconciler mostly read the others.
CREATE INDEX sandboxes_team_live ON sandboxes (team_id, created_at DESC, id DESC)
    WHERE state NOT IN ('stopped', 'error');
CREATE INDEX sandboxes_host_live ON sandboxes (host_id, state)
    WHERE state NOT IN ('stopped', 'error');
CREATE INDEX sandboxes_metadata ON sandboxes USING gin (metadata jsonb_path_ops);

CREATE TABLE idempotency_keys (
    team_id      uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    key          text NOT NULL,
    -- SHA-256 of the request.
    request_hash bytea NOT NULL,
    sandbox_id   uuid NOT NULL REFERENCES sandboxes ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, key)
);
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_sandbox ON idempotency_keys (sandbox_id);

-- +goose Down
DROP TABLE idempotency_keys, sandboxes, host_templates, templates, hosts, api_keys, team_members, teams, users;

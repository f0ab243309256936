-- +goose Up

-- Usage. A run is a time in which a sandbox uses its host's processors and memory:
-- while it is running, missing or pausing. A trigger updates this table, so that every
-- change of a state and its run are one transaction.
CREATE TABLE sandbox_runs (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- No references, because usage outlives its team and sandbox.
    sandbox_id uuid NOT NULL,
    team_id    uuid NOT NULL,
    vcpus      integer NOT NULL,
    memory_mib integer NOT NULL,
    -- true: the run began with a creation. false: with a resume.
    first      boolean NOT NULL,
    started_at timestamptz NOT NULL,
    -- When its host last reported, if the host is unreachable. NULL: it is reachable.
    missing_at timestamptz,
    ended_at   timestamptz CHECK (ended_at >= started_at)
);
CREATE UNIQUE INDEX sandbox_runs_open ON sandbox_runs (sandbox_id) WHERE ended_at IS NULL;
CREATE INDEX sandbox_runs_team ON sandbox_runs (team_id, ended_at);
CREATE INDEX sandbox_runs_ended ON sandbox_runs (ended_at);

-- Usage of teams on past days (UTC).
CREATE TABLE usage_days (
    team_id            uuid NOT NULL,
    day                date NOT NULL,
    vcpu_seconds       numeric NOT NULL,
    memory_mib_seconds numeric NOT NULL,
    starts             bigint NOT NULL,
    PRIMARY KEY (team_id, day)
);
CREATE INDEX usage_days_day ON usage_days (day, team_id);
-- The days in usage_days. A late report about a day removes the day, so that it is
-- computed again.
CREATE TABLE usage_rollups (
    day date PRIMARY KEY
);

-- utc_day returns the beginning of a day in UTC.
CREATE FUNCTION utc_day(day date) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$ SELECT day::timestamp AT TIME ZONE 'UTC' $$;
-- seconds_of_day returns how many seconds of a day a run has. NULL: it has not ended.
CREATE FUNCTION seconds_of_day(day date, started timestamptz, ended timestamptz) RETURNS numeric LANGUAGE sql STABLE AS
    $$ SELECT GREATEST(0, EXTRACT(EPOCH FROM LEAST(COALESCE(ended, now()), utc_day(day + 1)) - GREATEST(started, utc_day(day)))) $$;

-- +goose StatementBegin
CREATE FUNCTION usage_changed(since timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    today     date := (now() AT TIME ZONE 'UTC')::date;
    first_day date := (since AT TIME ZONE 'UTC')::date;
BEGIN
    IF first_day < today THEN
        -- Whoever computes days holds this lock exclusively. So either they see this
        -- change, or this statement sees their day.
        PERFORM pg_advisory_xact_lock_shared(hashtext('wrenn.usage'));
        -- Older runs may have been deleted.
        DELETE FROM usage_rollups WHERE day >= GREATEST(first_day, today - 30);
    END IF;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION sandboxes_run() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ran  boolean := TG_OP <> 'INSERT' AND OLD.state IN ('running', 'missing', 'pausing');
    runs boolean := TG_OP <> 'DELETE' AND NEW.state IN ('running', 'missing', 'pausing');
    run  sandbox_runs;
    at   timestamptz := now();
BEGIN
    IF runs AND NOT ran THEN
        IF TG_OP = 'INSERT' OR OLD.state IN ('pending', 'starting') THEN
            at := LEAST(COALESCE(NEW.started_at, now()), now());
        END IF;
        INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at)
        VALUES (NEW.id, NEW.team_id, NEW.vcpus, NEW.memory_mib, TG_OP = 'INSERT' OR OLD.state IN ('pending', 'starting'), at);
        PERFORM usage_changed(at);
    ELSIF runs AND OLD.state <> 'missing' AND NEW.state = 'missing' THEN
        UPDATE sandbox_runs SET missing_at = GREATEST(started_at, LEAST(now(), COALESCE((SELECT last_seen_at FROM hosts WHERE id = NEW.host_id), now())))
        WHERE sandbox_id = NEW.id AND ended_at IS NULL RETURNING missing_at INTO at;
        PERFORM usage_changed(at);
    ELSIF runs AND OLD.state = 'missing' AND NEW.state <> 'missing' THEN
        -- It ran all the time.
        SELECT missing_at INTO at FROM sandbox_runs WHERE sandbox_id = NEW.id AND ended_at IS NULL;
        UPDATE sandbox_runs SET missing_at = NULL WHERE sandbox_id = NEW.id AND ended_at IS NULL;
        PERFORM usage_changed(at);
    ELSIF ran AND NOT runs THEN
        SELECT * INTO run FROM sandbox_runs WHERE sandbox_id = OLD.id AND ended_at IS NULL;
        IF run.id IS NULL THEN
            RETURN NULL; -- It began before runs were stored.
        END IF;
        -- Use the end that the host reports, or, if the host did not come back, the
        -- time of its last report.
        IF TG_OP <> 'DELETE' AND NEW.state = 'paused' AND NEW.paused_at IS NOT NULL THEN
            at := NEW.paused_at;
        ELSIF TG_OP <> 'DELETE' AND NEW.state = 'stopped' AND NEW.end_reason IN ('expired', 'exited') THEN
            at := NEW.ended_at;
        ELSIF run.missing_at IS NOT NULL THEN
            at := run.missing_at;
        END IF;
        at := GREATEST(run.started_at, LEAST(at, now()));
        UPDATE sandbox_runs SET ended_at = at, missing_at = NULL WHERE id = run.id;
        PERFORM usage_changed(at);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_run AFTER INSERT OR UPDATE OF state OR DELETE ON sandboxes
    FOR EACH ROW EXECUTE FUNCTION sandboxes_run();
-- The sandboxes that run during the migration.
INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at)
SELECT id, team_id, vcpus, memory_mib, paused_at IS NULL, COALESCE(started_at, created_at) FROM sandboxes WHERE state IN ('running', 'missing', 'pausing');

-- Audit records: who changed what, and what changed without a request. Never updated.
CREATE TABLE audit_records (
    id          uuid PRIMARY KEY,
    at          timestamptz NOT NULL,
    -- The team whose record it is. NULL: only the platform's. No references, because
    -- records outlive their objects.
    team_id     uuid,
    actor       text NOT NULL CHECK (actor IN ('user', 'key', 'host', 'platform', 'anonymous')),
    actor_id    uuid,
    -- The user, or the creator of the key.
    user_id     uuid,
    -- The API operation, or the event ("sandbox.expired").
    action      text NOT NULL,
    object      text NOT NULL,
    -- The object's id in its wire form, or its name.
    object_id   text NOT NULL,
    address     text NOT NULL,
    request_id  text NOT NULL,
    result      text NOT NULL CHECK (result IN ('ok', 'refused', 'failed')),
    -- The error's code, if the request failed.
    code        text NOT NULL
);
CREATE INDEX audit_records_team ON audit_records (team_id, at DESC, id DESC);
CREATE INDEX audit_records_at ON audit_records (at DESC, id DESC);

-- Notifications.
CREATE TABLE channels (
    id              uuid PRIMARY KEY,
    team_id         uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    name            text NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('webhook', 'slack', 'discord', 'email')),
    events          text[] NOT NULL,
    -- Where it goes, without secrets, as clients see it.
    target          text NOT NULL,
    -- The target and the secret that signs messages, encrypted.
    sealed          bytea NOT NULL,
    enabled         boolean NOT NULL DEFAULT true,
    -- Why the server disabled it.
    disabled_reason text NOT NULL DEFAULT '',
    -- When deliveries began to fail.
    failing_since   timestamptz,
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX channels_team ON channels (team_id, created_at, id);

CREATE TABLE deliveries (
    id          uuid PRIMARY KEY,
    channel_id  uuid NOT NULL REFERENCES channels ON DELETE CASCADE,
    event       text NOT NULL,
    -- The fields of the message.
    body        jsonb NOT NULL,
    state       text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    created_at  timestamptz NOT NULL DEFAULT now(),
    attempts    integer NOT NULL DEFAULT 0,
    -- The next attempt of a pending delivery. A server postpones it before it tries,
    -- so that another attempt follows if the server dies.
    next_at     timestamptz NOT NULL DEFAULT now(),
    -- The last attempt: its time, its duration, the HTTP status (0: none) and the
    -- error.
    tried_at    timestamptz,
    took_ms     bigint NOT NULL DEFAULT 0,
    status      integer NOT NULL DEFAULT 0,
    error       text NOT NULL DEFAULT ''
);
CREATE INDEX deliveries_due ON deliveries (next_at) WHERE state = 'pending';
CREATE INDEX deliveries_channel ON deliveries (channel_id, created_at DESC, id DESC);
CREATE INDEX deliveries_age ON deliveries (created_at);

-- notify_channels adds deliveries of an event to the team's channels that subscribe to
-- it, or, if team is NULL, to all channels that do. It runs in the event's transaction.
-- +goose StatementBegin
CREATE FUNCTION notify_channels(team uuid, what text, said jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO deliveries (id, channel_id, event, body)
    SELECT gen_random_uuid(), id, what, said FROM channels WHERE (team_id = team OR team IS NULL) AND enabled AND what = ANY (events);
    IF FOUND THEN
        PERFORM pg_notify('wrenn_deliveries', '');
    END IF;
END $$;
-- +goose StatementEnd

-- Events of sandboxes notify their team's channels. Those that nobody requested are
-- also recorded.
-- +goose StatementBegin
CREATE FUNCTION sandboxes_told() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    event  text;
    itself text;
BEGIN
    IF NEW.state = OLD.state THEN
        RETURN NULL;
    END IF;
    event := CASE
        WHEN NEW.state = 'running' AND OLD.state IN ('pending', 'starting') THEN 'sandbox.started'
        WHEN NEW.state = 'paused' THEN 'sandbox.paused'
        WHEN NEW.state = 'error' THEN 'sandbox.failed'
        WHEN NEW.state = 'stopped' AND NEW.end_reason = 'lost' THEN 'sandbox.lost'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'stopped' THEN 'sandbox.ended'
    END;
    IF event IS NOT NULL THEN
        PERFORM notify_channels(NEW.team_id, event, jsonb_build_object('sandbox', NEW.id, 'template', NEW.template_name, 'state', NEW.state,
            'reason', NEW.end_reason, 'error', NULLIF(NEW.error, ''), 'metadata', NEW.metadata, 'at', now()));
    END IF;
    itself := CASE
        WHEN NEW.state = 'stopped' AND NEW.end_reason IN ('expired', 'exited', 'lost') THEN 'sandbox.' || NEW.end_reason
        WHEN NEW.state = 'paused' AND OLD.state IN ('running', 'missing') THEN 'sandbox.paused'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'running' AND OLD.state = 'missing' THEN 'sandbox.found'
    END;
    IF itself IS NOT NULL THEN
        INSERT INTO audit_records (id, at, team_id, actor, actor_id, action, object, object_id, address, request_id, result, code)
        SELECT gen_random_uuid(), now(), NEW.team_id, by_host.actor, CASE by_host.actor WHEN 'host' THEN NEW.host_id END, itself, 'sandbox', NEW.id::text, '', '', 'ok', ''
        FROM (SELECT CASE WHEN itself IN ('sandbox.expired', 'sandbox.exited', 'sandbox.paused') THEN 'host' ELSE 'platform' END AS actor) by_host;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_told AFTER UPDATE OF state ON sandboxes
    FOR EACH ROW EXECUTE FUNCTION sandboxes_told();

-- Events of hosts notify the channels of the platform's admins.
-- +goose StatementBegin
CREATE FUNCTION hosts_told() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status = OLD.status OR NEW.deleted_at IS NOT NULL OR NEW.status NOT IN ('unreachable', 'online') OR OLD.status = 'pending' THEN
        RETURN NULL;
    END IF;
    PERFORM notify_channels(NULL, 'host.' || NEW.status, jsonb_build_object('host', NEW.id, 'name', NEW.name, 'at', now()));
    INSERT INTO audit_records (id, at, actor, action, object, object_id, address, request_id, result, code)
    VALUES (gen_random_uuid(), now(), 'platform', 'host.' || NEW.status, 'host', NEW.id::text, '', '', 'ok', '');
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER hosts_told AFTER UPDATE OF status ON hosts
    FOR EACH ROW EXECUTE FUNCTION hosts_told();

-- The end of a build notifies channels.
-- +goose StatementBegin
CREATE FUNCTION builds_told() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> OLD.state AND NEW.state IN ('succeeded', 'failed', 'cancelled') THEN
        PERFORM notify_channels(NEW.team_id, 'build.finished', jsonb_build_object('build', NEW.id, 'name', NEW.name, 'version', NEW.version,
            'state', NEW.state, 'error', NULLIF(NEW.error, ''), 'at', now()));
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER builds_told AFTER UPDATE OF state ON builds
    FOR EACH ROW EXECUTE FUNCTION builds_told();

-- Leases for work that one server at a time does, such as summing up and pruning: the
-- server, and the lease's end.
CREATE TABLE leases (
    name   text PRIMARY KEY,
    server uuid NOT NULL,
    until  timestamptz NOT NULL
);

-- +goose Down
DROP TRIGGER sandboxes_run ON sandboxes;
DROP TRIGGER sandboxes_told ON sandboxes;
DROP TRIGGER hosts_told ON hosts;
DROP TRIGGER builds_told ON builds;
DROP FUNCTION sandboxes_run, usage_changed, seconds_of_day, utc_day, sandboxes_told, hosts_told, builds_told, notify_channels;
DROP TABLE leases, deliveries, channels, audit_records, usage_rollups, usage_days, sandbox_runs;

-- +goose Up

-- Sets of sandboxes' states. To change one, replace its function, which triggers and
-- queries call. TestStates compares each with the table in sandboxes/state.go.

-- It has not ended. Partial indexes have the same condition, and PostgreSQL recognizes
-- it, because it inlines the function.
CREATE FUNCTION sandbox_is_live(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state NOT IN ('stopped', 'error') $$;
-- It is being created.
CREATE FUNCTION sandbox_is_starting(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state IN ('pending', 'starting') $$;
-- It counts for the memory and processors of its host and its team.
CREATE FUNCTION sandbox_uses_host(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state NOT IN ('paused', 'stopped', 'error') $$;
-- Its time counts as usage of its team.
CREATE FUNCTION sandbox_is_billed(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state IN ('running', 'missing', 'pausing') $$;
-- Its memory is on disk, or being saved or restored.
CREATE FUNCTION sandbox_has_image(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state IN ('pausing', 'paused', 'resuming') $$;
-- A server is working on it.
CREATE FUNCTION sandbox_in_transit(state text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT state IN ('pending', 'starting', 'pausing', 'resuming', 'stopping') $$;

-- The sizes that quotas assume for objects without one. TestDefaultSizes compares them
-- with the constants in Go.
CREATE FUNCTION default_disk_mib() RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT 5120 $$;
CREATE FUNCTION default_memory_mib() RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT 512 $$;

-- As before, with these functions in place of literals.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_running(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT sandbox_uses_host(state)::integer $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_disk(state text, disk_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN sandbox_is_live(state) THEN COALESCE(NULLIF(disk_mib, 0), default_disk_mib()) ELSE 0 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_stored(state text, on_timeout text, saved boolean, memory_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN sandbox_is_live(state) AND (saved OR on_timeout = 'pause' OR sandbox_has_image(state)) THEN memory_mib ELSE 0 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_ended(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT (NOT sandbox_is_live(state))::integer $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION template_stored(state text, size_bytes bigint, disk_mib integer, memory_mib integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state = 'pending' THEN COALESCE(NULLIF(disk_mib, 0), default_disk_mib())::bigint + COALESCE(NULLIF(memory_mib, 0), default_memory_mib()) ELSE mib(size_bytes) END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_worker() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.worker = CASE WHEN sandbox_in_transit(NEW.state)
        THEN NULLIF(current_setting('wrenn.server', true), '')::uuid END;
    RETURN NEW;
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_run() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ran  boolean := TG_OP <> 'INSERT' AND sandbox_is_billed(OLD.state);
    runs boolean := TG_OP <> 'DELETE' AND sandbox_is_billed(NEW.state);
    run  sandbox_runs;
    at   timestamptz := now();
BEGIN
    IF runs AND NOT ran THEN
        IF TG_OP = 'INSERT' OR sandbox_is_starting(OLD.state) THEN
            at := LEAST(COALESCE(NEW.started_at, now()), now());
        END IF;
        INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at)
        VALUES (NEW.id, NEW.team_id, NEW.vcpus, NEW.memory_mib, TG_OP = 'INSERT' OR sandbox_is_starting(OLD.state), at);
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
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_told() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    event  text;
    itself text;
BEGIN
    IF NEW.state = OLD.state THEN
        RETURN NULL;
    END IF;
    event := CASE
        WHEN NEW.state = 'running' AND sandbox_is_starting(OLD.state) THEN 'sandbox.started'
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
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION revoke_tokens(teams uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- In the order in which every statement that changes several locks them.
    PERFORM FROM sandboxes WHERE team_id = ANY (teams) AND sandbox_is_live(state) ORDER BY id FOR UPDATE;
    UPDATE sandboxes SET token_epoch = token_epoch + 1 WHERE team_id = ANY (teams) AND sandbox_is_live(state);
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION forget_ended(team uuid, excess bigint, excess_bytes bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    going uuid[];
BEGIN
    going := ARRAY(SELECT s.id FROM sandboxes s WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM (
            SELECT f.id, row_number() OVER w AS n, COALESCE(sum(sandbox_bytes(f.metadata, f.error)) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
            FROM (SELECT id, ended_at, metadata, error FROM sandboxes WHERE team_id = team AND NOT sandbox_is_live(state)
                ORDER BY ended_at, id LIMIT LEAST(GREATEST(excess, 0) + 100, 1000)) AS f
            WINDOW w AS (ORDER BY f.ended_at, f.id)) AS o
        WHERE o.n <= excess OR o.before < excess_bytes)) ORDER BY s.id FOR UPDATE SKIP LOCKED);
    DELETE FROM idempotency_keys WHERE idempotency_keys.ctid = ANY (ARRAY(
        SELECT k.ctid FROM idempotency_keys k WHERE k.sandbox_id = ANY (going) ORDER BY k.team_id, k.key FOR UPDATE SKIP LOCKED));
    DELETE FROM sandboxes WHERE sandboxes.id = ANY (going) AND NOT EXISTS (SELECT FROM idempotency_keys k WHERE k.sandbox_id = sandboxes.id);
END $$;
-- +goose StatementEnd

-- +goose Down
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_running(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('paused', 'stopped', 'error') THEN 0 ELSE 1 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_disk(state text, disk_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('stopped', 'error') THEN 0 WHEN disk_mib = 0 THEN 5120 ELSE disk_mib END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_stored(state text, on_timeout text, saved boolean, memory_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state NOT IN ('stopped', 'error') AND (saved OR on_timeout = 'pause' OR state IN ('pausing', 'paused', 'resuming')) THEN memory_mib ELSE 0 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandbox_ended(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT CASE WHEN state IN ('stopped', 'error') THEN 1 ELSE 0 END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION template_stored(state text, size_bytes bigint, disk_mib integer, memory_mib integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state = 'pending' THEN COALESCE(NULLIF(disk_mib, 0), 5120)::bigint + COALESCE(NULLIF(memory_mib, 0), 512) ELSE mib(size_bytes) END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_worker() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.worker = CASE WHEN NEW.state IN ('pending', 'starting', 'pausing', 'resuming', 'stopping')
        THEN NULLIF(current_setting('wrenn.server', true), '')::uuid END;
    RETURN NEW;
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_run() RETURNS trigger LANGUAGE plpgsql AS $$
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
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_told() RETURNS trigger LANGUAGE plpgsql AS $$
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
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION revoke_tokens(teams uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- In the order in which every statement that changes several locks them.
    PERFORM FROM sandboxes WHERE team_id = ANY (teams) AND state NOT IN ('stopped', 'error') ORDER BY id FOR UPDATE;
    UPDATE sandboxes SET token_epoch = token_epoch + 1 WHERE team_id = ANY (teams) AND state NOT IN ('stopped', 'error');
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION forget_ended(team uuid, excess bigint, excess_bytes bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    going uuid[];
BEGIN
    going := ARRAY(SELECT s.id FROM sandboxes s WHERE s.id = ANY (ARRAY(
        SELECT o.id FROM (
            SELECT f.id, row_number() OVER w AS n, COALESCE(sum(sandbox_bytes(f.metadata, f.error)) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
            FROM (SELECT id, ended_at, metadata, error FROM sandboxes WHERE team_id = team AND state IN ('stopped', 'error')
                ORDER BY ended_at, id LIMIT LEAST(GREATEST(excess, 0) + 100, 1000)) AS f
            WINDOW w AS (ORDER BY f.ended_at, f.id)) AS o
        WHERE o.n <= excess OR o.before < excess_bytes)) ORDER BY s.id FOR UPDATE SKIP LOCKED);
    DELETE FROM idempotency_keys WHERE idempotency_keys.ctid = ANY (ARRAY(
        SELECT k.ctid FROM idempotency_keys k WHERE k.sandbox_id = ANY (going) ORDER BY k.team_id, k.key FOR UPDATE SKIP LOCKED));
    DELETE FROM sandboxes WHERE sandboxes.id = ANY (going) AND NOT EXISTS (SELECT FROM idempotency_keys k WHERE k.sandbox_id = sandboxes.id);
END $$;
-- +goose StatementEnd
DROP FUNCTION sandbox_is_live, sandbox_is_starting, sandbox_uses_host, sandbox_is_billed, sandbox_has_image, sandbox_in_transit, default_disk_mib, default_memory_mib;

-- +goose Up

-- Rows of sandboxes and builds that have ended, and builds' logs, count too. A team
-- keeps its newest ones.
ALTER TABLE team_usage
    -- Of all rows of sandboxes and builds, with builds' logs.
    ADD record_bytes bigint NOT NULL DEFAULT 0,
    -- Sandboxes that have ended, and the bytes of their rows.
    ADD ended bigint NOT NULL DEFAULT 0,
    ADD ended_bytes bigint NOT NULL DEFAULT 0;
-- The size of the build's log. NULL until the build has ended.
ALTER TABLE builds ADD log_bytes bigint;
CREATE INDEX builds_unsettled ON builds (team_id, id) WHERE log_bytes IS NULL AND state NOT IN ('queued', 'running');
CREATE INDEX sandboxes_team_ended ON sandboxes (team_id, ended_at, id) WHERE state IN ('stopped', 'error');

CREATE FUNCTION most_ended() RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT 10000::bigint $$;
CREATE FUNCTION most_ended_bytes() RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT 64::bigint << 20 $$;
CREATE FUNCTION records_mib(bytes bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT bytes / 1048576 $$;
CREATE FUNCTION sandbox_ended(state text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT CASE WHEN state IN ('stopped', 'error') THEN 1 ELSE 0 END $$;
-- The size of a row with its index entries and its idempotency key.
CREATE FUNCTION sandbox_bytes(metadata jsonb, error text) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT 2048::bigint + 2 * octet_length(metadata::text) + octet_length(error) $$;
-- The log of a build that has not ended counts with its maximum size.
CREATE FUNCTION build_bytes(log_bytes bigint, recipe text) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT 2048::bigint + octet_length(recipe) + COALESCE(log_bytes, 16 << 20) $$;

-- Deletes the team's sandboxes that ended first, up to a number of rows and of bytes. It
-- skips locked rows, because its caller has locked the team's usage, which must be locked
-- last.
-- +goose StatementBegin
CREATE FUNCTION forget_ended(team uuid, excess bigint, excess_bytes bigint) RETURNS void LANGUAGE plpgsql AS $$
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

DROP FUNCTION charge_team(uuid, bigint, bigint, bigint, bigint, bigint, boolean);
-- As before, plus the bytes of records.
-- +goose StatementBegin
CREATE FUNCTION charge_team(team uuid, add_running bigint, add_vcpus bigint, add_memory bigint, add_disk bigint, add_stored bigint, enforce boolean,
    add_bytes bigint DEFAULT 0, add_ended bigint DEFAULT 0, add_ended_bytes bigint DEFAULT 0) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    has   team_usage;
    may   record;
    whose text := 'the team';
    owned uuid;
BEGIN
    IF NOT enforce AND GREATEST(add_running, add_vcpus, add_memory, add_disk, add_stored, add_bytes, add_ended) <= 0 THEN
        -- No row: the team is being deleted with everything that it had.
        UPDATE team_usage SET running = running + add_running, vcpus = vcpus + add_vcpus, memory_mib = memory_mib + add_memory,
            disk_mib = disk_mib + add_disk, stored_mib = stored_mib + add_stored,
            record_bytes = record_bytes + add_bytes, ended = ended + add_ended, ended_bytes = ended_bytes + add_ended_bytes WHERE team_id = team;
        RETURN;
    END IF;
    INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, stored_mib, record_bytes, ended, ended_bytes)
    VALUES (team, add_running, add_vcpus, add_memory, add_disk, add_stored, add_bytes, add_ended, add_ended_bytes)
    ON CONFLICT (team_id) DO UPDATE SET running = u.running + EXCLUDED.running, vcpus = u.vcpus + EXCLUDED.vcpus,
        memory_mib = u.memory_mib + EXCLUDED.memory_mib, disk_mib = u.disk_mib + EXCLUDED.disk_mib, stored_mib = u.stored_mib + EXCLUDED.stored_mib,
        record_bytes = u.record_bytes + EXCLUDED.record_bytes, ended = u.ended + EXCLUDED.ended, ended_bytes = u.ended_bytes + EXCLUDED.ended_bytes
    RETURNING u.* INTO has;
    IF add_ended > 0 AND (has.ended > most_ended() OR has.ended_bytes > most_ended_bytes()) THEN
        PERFORM forget_ended(team, has.ended - most_ended(), has.ended_bytes - most_ended_bytes());
    END IF;
    IF NOT enforce THEN
        RETURN;
    END IF;
    -- Records count as stored in whole MiB, once one more is full.
    add_stored := add_stored + records_mib(has.record_bytes) - records_mib(has.record_bytes - add_bytes);
    has.stored_mib := has.stored_mib + records_mib(has.record_bytes);
    PERFORM FROM teams WHERE id = team AND deleting_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ002', MESSAGE = 'no such team';
    END IF;
    SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib, max_stored_mib INTO may FROM team_quotas WHERE team_id = team;
    IF NOT FOUND THEN
        SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib, max_stored_mib INTO may FROM platform_settings;
        owned := team_owner(team);
        IF owned IS NOT NULL THEN
            -- If two teams of one owner are charged at once, one waits.
            PERFORM pg_advisory_xact_lock(hashtextextended('wrenn.owner.' || owned, 0));
            SELECT sum(u.running) AS running, sum(u.vcpus) AS vcpus, sum(u.memory_mib) AS memory_mib, sum(u.disk_mib) AS disk_mib, sum(u.stored_mib + records_mib(u.record_bytes)) AS stored_mib
            INTO has.running, has.vcpus, has.memory_mib, has.disk_mib, has.stored_mib
            FROM team_members AS m JOIN team_usage AS u USING (team_id)
            WHERE m.user_id = owned AND m.role = 'owner' AND team_owner(m.team_id) = owned AND NOT EXISTS (SELECT FROM team_quotas AS q WHERE q.team_id = m.team_id);
            whose := 'all teams of the team''s owner together';
        END IF;
    END IF;
    IF add_running > 0 AND has.running > may.max_running THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may run %s sandboxes at once: %s run, and %s more were asked for', whose, may.max_running, has.running - add_running, add_running);
    ELSIF add_vcpus > 0 AND has.vcpus > may.max_vcpus THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may use %s virtual CPUs at once: %s are in use, and %s more were asked for', whose, may.max_vcpus, has.vcpus - add_vcpus, add_vcpus);
    ELSIF add_memory > 0 AND has.memory_mib > may.max_memory_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may use %s MiB of memory at once: %s are in use, and %s more were asked for', whose, may.max_memory_mib, has.memory_mib - add_memory, add_memory);
    ELSIF add_disk > 0 AND has.disk_mib > may.max_disk_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may have %s MiB of disk: there are %s, and %s more were asked for', whose, may.max_disk_mib, has.disk_mib - add_disk, add_disk);
    ELSIF add_stored > 0 AND has.stored_mib > may.max_stored_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may store %s MiB of templates, snapshots, layers, saved memory, archives, logs and records: there are %s, and up to %s more were asked for', whose, may.max_stored_mib, has.stored_mib - add_stored, add_stored);
    END IF;
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.stored, true, t.bytes, t.ended, t.ended_bytes) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk, sum(sandbox_stored(state, on_timeout, saved, memory_mib)) AS stored,
                sum(sandbox_bytes(metadata, error))::bigint AS bytes, sum(sandbox_ended(state)) AS ended, sum(sandbox_ended(state) * sandbox_bytes(metadata, error))::bigint AS ended_bytes
            FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, -t.running, -t.vcpus, -t.memory, -t.disk, -t.stored, false, -t.bytes, -t.ended, -t.ended_bytes) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk, sum(sandbox_stored(state, on_timeout, saved, memory_mib)) AS stored,
                sum(sandbox_bytes(metadata, error))::bigint AS bytes, sum(sandbox_ended(state)) AS ended, sum(sandbox_ended(state) * sandbox_bytes(metadata, error))::bigint AS ended_bytes
            FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        -- Only requested resumes and pauses can be refused, not what hosts did by
        -- themselves or because they drain. Sandboxes that pause at their timeout
        -- have the room reserved.
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.stored, t.asked, t.bytes, t.ended, t.ended_bytes) FROM (
            SELECT n.team_id, bool_or(o.state = 'paused' AND n.state = 'resuming' OR o.state = 'running' AND n.state = 'pausing' AND NOT n.drained) AS asked,
                sum(sandbox_running(n.state) - sandbox_running(o.state)) AS running,
                sum(sandbox_running(n.state) * n.vcpus - sandbox_running(o.state) * o.vcpus) AS vcpus,
                sum(sandbox_running(n.state) * n.memory_mib - sandbox_running(o.state) * o.memory_mib) AS memory,
                sum(sandbox_disk(n.state, n.disk_mib) - sandbox_disk(o.state, o.disk_mib)) AS disk,
                sum(sandbox_stored(n.state, n.on_timeout, n.saved, n.memory_mib) - sandbox_stored(o.state, o.on_timeout, o.saved, o.memory_mib)) AS stored,
                sum(sandbox_bytes(n.metadata, n.error) - sandbox_bytes(o.metadata, o.error))::bigint AS bytes, sum(sandbox_ended(n.state) - sandbox_ended(o.state)) AS ended,
                sum(sandbox_ended(n.state) * sandbox_bytes(n.metadata, n.error) - sandbox_ended(o.state) * sandbox_bytes(o.metadata, o.error))::bigint AS ended_bytes
            FROM removed o JOIN added n USING (id)
            WHERE (n.state, n.on_timeout, n.saved, n.vcpus, n.memory_mib, n.disk_mib, n.metadata, n.error) IS DISTINCT FROM (o.state, o.on_timeout, o.saved, o.vcpus, o.memory_mib, o.disk_mib, o.metadata, o.error)
            GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE (t.running, t.vcpus, t.memory, t.disk, t.stored, t.bytes, t.ended, t.ended_bytes) IS DISTINCT FROM (0, 0, 0, 0, 0, 0, 0, 0);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- Builds are charged when they are created, when their logs are measured, and when they
-- are deleted, but not when they end, because the end of a build then locks templates.
-- +goose StatementBegin
CREATE FUNCTION builds_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, 0, true, t.bytes) FROM (
            SELECT team_id, sum(build_bytes(log_bytes, recipe))::bigint AS bytes FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, 0, false, -t.bytes) FROM (
            SELECT team_id, sum(build_bytes(log_bytes, recipe))::bigint AS bytes FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, 0, false, t.bytes) FROM (
            SELECT n.team_id, sum(build_bytes(n.log_bytes, n.recipe) - build_bytes(o.log_bytes, o.recipe))::bigint AS bytes
            FROM removed o JOIN added n USING (id) WHERE n.log_bytes IS DISTINCT FROM o.log_bytes GROUP BY n.team_id ORDER BY n.team_id) t;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
UPDATE builds SET log_bytes = (SELECT COALESCE(sum(pg_column_size(log) + 100), 0) FROM build_steps WHERE build_id = builds.id) WHERE state NOT IN ('queued', 'running');
CREATE TRIGGER builds_added AFTER INSERT ON builds REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION builds_charge();
CREATE TRIGGER builds_changed AFTER UPDATE ON builds REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION builds_charge();
CREATE TRIGGER builds_removed AFTER DELETE ON builds REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION builds_charge();

-- The number of requested tags is limited. Each name also has one tag "latest".
CREATE FUNCTION most_tags() RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT 10000::bigint $$;
-- +goose StatementBegin
CREATE FUNCTION tags_bounded() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM (SELECT DISTINCT team_id FROM added WHERE tag <> 'latest') a
            WHERE (SELECT count(*) FROM (SELECT FROM template_tags t WHERE t.team_id = a.team_id LIMIT most_tags() + 1) AS first_ones) > most_tags()) THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('the team''s templates may have %s tags together: remove some first', most_tags());
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER tags_bounded AFTER INSERT ON template_tags REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION tags_bounded();

-- What exists during the migration.
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, record_bytes, ended, ended_bytes)
SELECT team_id, 0, 0, 0, 0, sum(bytes), sum(ended), sum(ended * bytes) FROM (
    SELECT team_id, sandbox_bytes(metadata, error) AS bytes, sandbox_ended(state) AS ended FROM sandboxes
    UNION ALL SELECT team_id, build_bytes(log_bytes, recipe), 0 FROM builds) AS all_of_them
GROUP BY team_id
ON CONFLICT (team_id) DO UPDATE SET record_bytes = EXCLUDED.record_bytes, ended = EXCLUDED.ended, ended_bytes = EXCLUDED.ended_bytes;

-- +goose Down
DROP TRIGGER tags_bounded ON template_tags;
DROP TRIGGER builds_added ON builds;
DROP TRIGGER builds_changed ON builds;
DROP TRIGGER builds_removed ON builds;
DROP FUNCTION tags_bounded, builds_charge, most_tags;
DROP FUNCTION charge_team(uuid, bigint, bigint, bigint, bigint, bigint, boolean, bigint, bigint, bigint);
-- +goose StatementBegin
CREATE FUNCTION charge_team(team uuid, add_running bigint, add_vcpus bigint, add_memory bigint, add_disk bigint, add_stored bigint, enforce boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    has   team_usage;
    may   record;
    whose text := 'the team';
    owned uuid;
BEGIN
    IF NOT enforce AND GREATEST(add_running, add_vcpus, add_memory, add_disk, add_stored) <= 0 THEN
        -- No row: the team is being deleted with everything that it had.
        UPDATE team_usage SET running = running + add_running, vcpus = vcpus + add_vcpus, memory_mib = memory_mib + add_memory,
            disk_mib = disk_mib + add_disk, stored_mib = stored_mib + add_stored WHERE team_id = team;
        RETURN;
    END IF;
    INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, stored_mib) VALUES (team, add_running, add_vcpus, add_memory, add_disk, add_stored)
    ON CONFLICT (team_id) DO UPDATE SET running = u.running + EXCLUDED.running, vcpus = u.vcpus + EXCLUDED.vcpus,
        memory_mib = u.memory_mib + EXCLUDED.memory_mib, disk_mib = u.disk_mib + EXCLUDED.disk_mib, stored_mib = u.stored_mib + EXCLUDED.stored_mib
    RETURNING u.* INTO has;
    IF NOT enforce THEN
        RETURN;
    END IF;
    PERFORM FROM teams WHERE id = team AND deleting_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ002', MESSAGE = 'no such team';
    END IF;
    SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib, max_stored_mib INTO may FROM team_quotas WHERE team_id = team;
    IF NOT FOUND THEN
        SELECT max_running, max_vcpus, max_memory_mib, max_disk_mib, max_stored_mib INTO may FROM platform_settings;
        owned := team_owner(team);
        IF owned IS NOT NULL THEN
            -- If two teams of one owner are charged at once, one waits.
            PERFORM pg_advisory_xact_lock(hashtextextended('wrenn.owner.' || owned, 0));
            SELECT sum(u.running) AS running, sum(u.vcpus) AS vcpus, sum(u.memory_mib) AS memory_mib, sum(u.disk_mib) AS disk_mib, sum(u.stored_mib) AS stored_mib
            INTO has.running, has.vcpus, has.memory_mib, has.disk_mib, has.stored_mib
            FROM team_members AS m JOIN team_usage AS u USING (team_id)
            WHERE m.user_id = owned AND m.role = 'owner' AND team_owner(m.team_id) = owned AND NOT EXISTS (SELECT FROM team_quotas AS q WHERE q.team_id = m.team_id);
            whose := 'all teams of the team''s owner together';
        END IF;
    END IF;
    IF add_running > 0 AND has.running > may.max_running THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may run %s sandboxes at once: %s run, and %s more were asked for', whose, may.max_running, has.running - add_running, add_running);
    ELSIF add_vcpus > 0 AND has.vcpus > may.max_vcpus THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may use %s virtual CPUs at once: %s are in use, and %s more were asked for', whose, may.max_vcpus, has.vcpus - add_vcpus, add_vcpus);
    ELSIF add_memory > 0 AND has.memory_mib > may.max_memory_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may use %s MiB of memory at once: %s are in use, and %s more were asked for', whose, may.max_memory_mib, has.memory_mib - add_memory, add_memory);
    ELSIF add_disk > 0 AND has.disk_mib > may.max_disk_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may have %s MiB of disk: there are %s, and %s more were asked for', whose, may.max_disk_mib, has.disk_mib - add_disk, add_disk);
    ELSIF add_stored > 0 AND has.stored_mib > may.max_stored_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may store %s MiB of templates, snapshots, layers, saved memory and archives: there are %s, and up to %s more were asked for', whose, may.max_stored_mib, has.stored_mib - add_stored, add_stored);
    END IF;
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.stored, true) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk, sum(sandbox_stored(state, on_timeout, saved, memory_mib)) AS stored
            FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, -t.running, -t.vcpus, -t.memory, -t.disk, -t.stored, false) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk, sum(sandbox_stored(state, on_timeout, saved, memory_mib)) AS stored
            FROM removed WHERE state NOT IN ('stopped', 'error') GROUP BY team_id ORDER BY team_id) t;
    ELSE
        -- Only requested resumes and pauses can be refused, not what hosts did by
        -- themselves or because they drain. Sandboxes that pause at their timeout
        -- have the room reserved.
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.stored, t.asked) FROM (
            SELECT n.team_id, bool_or(o.state = 'paused' AND n.state = 'resuming' OR o.state = 'running' AND n.state = 'pausing' AND NOT n.drained) AS asked,
                sum(sandbox_running(n.state) - sandbox_running(o.state)) AS running,
                sum(sandbox_running(n.state) * n.vcpus - sandbox_running(o.state) * o.vcpus) AS vcpus,
                sum(sandbox_running(n.state) * n.memory_mib - sandbox_running(o.state) * o.memory_mib) AS memory,
                sum(sandbox_disk(n.state, n.disk_mib) - sandbox_disk(o.state, o.disk_mib)) AS disk,
                sum(sandbox_stored(n.state, n.on_timeout, n.saved, n.memory_mib) - sandbox_stored(o.state, o.on_timeout, o.saved, o.memory_mib)) AS stored
            FROM removed o JOIN added n USING (id)
            WHERE (n.state, n.on_timeout, n.saved, n.vcpus, n.memory_mib, n.disk_mib) IS DISTINCT FROM (o.state, o.on_timeout, o.saved, o.vcpus, o.memory_mib, o.disk_mib)
            GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE (t.running, t.vcpus, t.memory, t.disk, t.stored) IS DISTINCT FROM (0, 0, 0, 0, 0);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
DROP FUNCTION forget_ended, most_ended, most_ended_bytes, records_mib, sandbox_ended, sandbox_bytes, build_bytes;
DROP INDEX builds_unsettled, sandboxes_team_ended;
ALTER TABLE builds DROP log_bytes;
ALTER TABLE team_usage DROP record_bytes, DROP ended, DROP ended_bytes;

-- +goose Up

-- Data that outlives a request counts before it is written: templates, snapshots,
-- builds' layers, the memory of paused sandboxes, and builds' archives.
ALTER TABLE platform_settings ADD max_stored_mib bigint DEFAULT 204800 CHECK (max_stored_mib >= 0);
ALTER TABLE team_quotas ADD max_stored_mib bigint CHECK (max_stored_mib >= 0);
ALTER TABLE team_usage ADD stored_mib bigint NOT NULL DEFAULT 0;

-- +goose StatementBegin
CREATE FUNCTION mib(bytes bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$ SELECT (bytes + 1048575) / 1048576 $$;
-- +goose StatementEnd
-- A template that is being made counts with its maximum size.
-- +goose StatementBegin
CREATE FUNCTION template_stored(state text, size_bytes bigint, disk_mib integer, memory_mib integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state = 'pending' THEN COALESCE(NULLIF(disk_mib, 0), 5120)::bigint + COALESCE(NULLIF(memory_mib, 0), 512) ELSE mib(size_bytes) END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE FUNCTION sandbox_stored(state text, memory_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('pausing', 'paused', 'resuming') THEN memory_mib ELSE 0 END $$;
-- +goose StatementEnd

-- The user for whom a team's usage counts: the owner who has been one for longest.
-- NULL: nobody, as for the platform's team.
-- +goose StatementBegin
CREATE FUNCTION team_owner(team uuid) RETURNS uuid LANGUAGE sql STABLE AS
$$ SELECT user_id FROM team_members WHERE team_id = team AND role = 'owner' ORDER BY created_at, user_id LIMIT 1 $$;
-- +goose StatementEnd

DROP FUNCTION charge_team(uuid, bigint, bigint, bigint, bigint, boolean);
-- Adds to a team's usage. With enforce, it fails with SQLSTATE WQ001 if the quota is
-- exceeded, and with WQ002 if the team is being deleted; the messages are for the
-- caller. Without enforce it records what has already happened. The
-- platform's quota applies to a team, and to all teams of one owner together that have
-- no quota of their own.
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
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, 0, true) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk
            FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, -t.running, -t.vcpus, -t.memory, -t.disk, -t.stored, false) FROM (
            SELECT team_id, sum(sandbox_running(state)) AS running, sum(sandbox_running(state) * vcpus) AS vcpus,
                sum(sandbox_running(state) * memory_mib) AS memory, sum(sandbox_disk(state, disk_mib)) AS disk, sum(sandbox_stored(state, memory_mib)) AS stored
            FROM removed WHERE state NOT IN ('stopped', 'error') GROUP BY team_id ORDER BY team_id) t;
    ELSE
        -- Only requested resumes and pauses can be refused, not what hosts did by
        -- themselves or because they drain.
        PERFORM charge_team(t.team_id, t.running, t.vcpus, t.memory, t.disk, t.stored, t.asked) FROM (
            SELECT n.team_id, bool_or(o.state = 'paused' AND n.state = 'resuming' OR o.state = 'running' AND n.state = 'pausing' AND NOT n.drained) AS asked,
                sum(sandbox_running(n.state) - sandbox_running(o.state)) AS running,
                sum(sandbox_running(n.state) * n.vcpus - sandbox_running(o.state) * o.vcpus) AS vcpus,
                sum(sandbox_running(n.state) * n.memory_mib - sandbox_running(o.state) * o.memory_mib) AS memory,
                sum(sandbox_disk(n.state, n.disk_mib) - sandbox_disk(o.state, o.disk_mib)) AS disk,
                sum(sandbox_stored(n.state, n.memory_mib) - sandbox_stored(o.state, o.memory_mib)) AS stored
            FROM removed o JOIN added n USING (id)
            WHERE (n.state, n.vcpus, n.memory_mib, n.disk_mib) IS DISTINCT FROM (o.state, o.vcpus, o.memory_mib, o.disk_mib)
            GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE (t.running, t.vcpus, t.memory, t.disk, t.stored) IS DISTINCT FROM (0, 0, 0, 0, 0);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- The same for templates and archives. A row for existing data, such as a template that
-- a host has again, is not refused.
-- +goose StatementBegin
CREATE FUNCTION templates_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, t.asked) FROM (
            SELECT team_id, bool_or(state = 'pending') AS asked, sum(template_stored(state, size_bytes, disk_mib, memory_mib))::bigint AS stored
            FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, -t.stored, false) FROM (
            SELECT team_id, sum(template_stored(state, size_bytes, disk_mib, memory_mib))::bigint AS stored FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, false) FROM (
            SELECT n.team_id, sum(template_stored(n.state, n.size_bytes, n.disk_mib, n.memory_mib) - template_stored(o.state, o.size_bytes, o.disk_mib, o.memory_mib))::bigint AS stored
            FROM removed o JOIN added n USING (id) GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE t.stored <> 0;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
-- An archive is added with size 0, written, and charged when it gets its size, so
-- that the team's usage is not locked while it is written.
-- +goose StatementBegin
CREATE FUNCTION archives_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, true) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM added GROUP BY team_id ORDER BY team_id) t
        WHERE t.stored <> 0;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, -t.stored, false) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, t.stored > 0) FROM (
            SELECT n.team_id, sum(mib(n.size_bytes) - mib(o.size_bytes))::bigint AS stored
            FROM removed o JOIN added n USING (team_id, digest) GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE t.stored <> 0;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER templates_added AFTER INSERT ON templates REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION templates_charge();
CREATE TRIGGER templates_changed AFTER UPDATE ON templates REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION templates_charge();
CREATE TRIGGER templates_removed AFTER DELETE ON templates REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION templates_charge();
CREATE TRIGGER archives_added AFTER INSERT ON build_archives REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION archives_charge();
CREATE TRIGGER archives_changed AFTER UPDATE ON build_archives REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION archives_charge();
CREATE TRIGGER archives_removed AFTER DELETE ON build_archives REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION archives_charge();

-- What exists during the migration.
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, stored_mib)
SELECT team_id, 0, 0, 0, 0, sum(stored) FROM (
    SELECT team_id, template_stored(state, size_bytes, disk_mib, memory_mib) AS stored FROM templates
    UNION ALL SELECT team_id, sandbox_stored(state, memory_mib) FROM sandboxes
    UNION ALL SELECT team_id, mib(size_bytes) FROM build_archives) AS all_of_them
GROUP BY team_id
ON CONFLICT (team_id) DO UPDATE SET stored_mib = EXCLUDED.stored_mib;

-- +goose Down
DROP TRIGGER templates_added ON templates;
DROP TRIGGER templates_changed ON templates;
DROP TRIGGER templates_removed ON templates;
DROP TRIGGER archives_added ON build_archives;
DROP TRIGGER archives_changed ON build_archives;
DROP TRIGGER archives_removed ON build_archives;
DROP FUNCTION templates_charge, archives_charge, template_stored, sandbox_stored, team_owner, mib;
ALTER TABLE team_usage DROP stored_mib;
ALTER TABLE team_quotas DROP max_stored_mib;
ALTER TABLE platform_settings DROP max_stored_mib;

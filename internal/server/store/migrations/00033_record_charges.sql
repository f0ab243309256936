-- +goose Up

-- Audit records, the times that sandboxes ran, and tags count as stored from the
-- transaction that writes them. Such a transaction can change sandboxes of several teams
-- in any order, so each charge is a row of its own, which waits for no lock. A check of a
-- quota adds up the team's rows and moves them into its usage.
CREATE TABLE record_charges (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- No reference, because that would lock the team.
    team_id uuid NOT NULL,
    bytes   bigint NOT NULL
);
CREATE INDEX record_charges_team ON record_charges (team_id) INCLUDE (bytes);

CREATE FUNCTION unsettled_bytes(team uuid) RETURNS bigint LANGUAGE sql STABLE AS
$$ SELECT COALESCE(sum(bytes), 0)::bigint FROM record_charges WHERE team_id = team $$;

-- The size of a record with its index entries.
CREATE FUNCTION record_size(kind text) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE kind WHEN 'audit_records' THEN 512 WHEN 'sandbox_runs' THEN 256 WHEN 'template_tags' THEN 256 END::bigint $$;

-- +goose StatementBegin
CREATE FUNCTION records_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO record_charges (team_id, bytes) SELECT a.team_id, record_size(TG_TABLE_NAME) * count(*)
        FROM added a WHERE EXISTS (SELECT FROM teams WHERE teams.id = a.team_id) GROUP BY a.team_id;
    ELSE
        INSERT INTO record_charges (team_id, bytes) SELECT r.team_id, -record_size(TG_TABLE_NAME) * count(*)
        FROM removed r WHERE EXISTS (SELECT FROM teams WHERE teams.id = r.team_id) GROUP BY r.team_id;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER records_added AFTER INSERT ON audit_records REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION records_charge();
CREATE TRIGGER records_removed AFTER DELETE ON audit_records REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION records_charge();
CREATE TRIGGER records_added AFTER INSERT ON sandbox_runs REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION records_charge();
CREATE TRIGGER records_removed AFTER DELETE ON sandbox_runs REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION records_charge();
CREATE TRIGGER records_added AFTER INSERT ON template_tags REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION records_charge();
CREATE TRIGGER records_removed AFTER DELETE ON template_tags REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION records_charge();

-- As before, plus the charges of records that are not in team_usage yet. Records
-- themselves are never refused, but a team without room for them can add nothing else.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION charge_team(team uuid, add_running bigint, add_vcpus bigint, add_memory bigint, add_disk bigint, add_stored bigint, enforce boolean,
    add_bytes bigint DEFAULT 0, add_ended bigint DEFAULT 0, add_ended_bytes bigint DEFAULT 0) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    has   team_usage;
    may   record;
    whose text := 'the team';
    owned uuid;
    -- The request adds nothing, and only asks whether there is room at all.
    asks  boolean := GREATEST(add_running, add_vcpus, add_memory, add_disk, add_stored, add_bytes) <= 0;
    bytes bigint;
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
    -- Only the holder of the lock on the team's usage may move its charges there.
    WITH gone AS (DELETE FROM record_charges AS c WHERE c.team_id = team RETURNING c.bytes)
    SELECT sum(gone.bytes) INTO bytes FROM gone;
    IF bytes <> 0 THEN
        UPDATE team_usage AS u SET record_bytes = u.record_bytes + bytes, swept_bytes = u.swept_bytes + bytes WHERE u.team_id = team;
        has.record_bytes := has.record_bytes + bytes;
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
            SELECT COALESCE(sum(u.running), 0) AS running, COALESCE(sum(u.vcpus), 0) AS vcpus, COALESCE(sum(u.memory_mib), 0) AS memory_mib, COALESCE(sum(u.disk_mib), 0) AS disk_mib,
                COALESCE(sum(COALESCE(u.stored_mib, 0) + records_mib(COALESCE(u.record_bytes, 0) + unsettled_bytes(m.team_id))), 0) AS stored_mib
            INTO has.running, has.vcpus, has.memory_mib, has.disk_mib, has.stored_mib
            FROM team_members AS m LEFT JOIN team_usage AS u USING (team_id)
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
    ELSIF (asks OR add_bytes > 0) AND has.stored_mib > may.max_stored_mib THEN
        RAISE EXCEPTION USING ERRCODE = 'WQ001', MESSAGE = format('%s may store %s MiB of templates, snapshots, layers, saved memory, archives, logs and records, and there are %s: remove some first', whose, may.max_stored_mib, has.stored_mib);
    END IF;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP TRIGGER records_added ON audit_records;
DROP TRIGGER records_removed ON audit_records;
DROP TRIGGER records_added ON sandbox_runs;
DROP TRIGGER records_removed ON sandbox_runs;
DROP TRIGGER records_added ON template_tags;
DROP TRIGGER records_removed ON template_tags;
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION charge_team(team uuid, add_running bigint, add_vcpus bigint, add_memory bigint, add_disk bigint, add_stored bigint, enforce boolean,
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
DROP FUNCTION records_charge, record_size, unsettled_bytes;
DROP TABLE record_charges;

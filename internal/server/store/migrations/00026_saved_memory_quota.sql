-- +goose Up

ALTER TABLE sandboxes
    -- Its host has its memory on disk, because it was paused once or is a fork. A pause's
    -- files stay after the resume, and the next pause adds to them.
    ADD saved boolean NOT NULL DEFAULT false;
UPDATE sandboxes SET saved = true WHERE state NOT IN ('stopped', 'error') AND (state IN ('paused', 'resuming') OR forked_from IS NOT NULL);

-- +goose StatementBegin
CREATE FUNCTION sandboxes_saved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.saved := NEW.saved OR NEW.state = 'paused' OR NEW.forked_from IS NOT NULL;
    RETURN NEW;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_saved BEFORE INSERT OR UPDATE OF state ON sandboxes FOR EACH ROW EXECUTE FUNCTION sandboxes_saved();

-- A sandbox that pauses at its timeout reserves the room from the beginning, because
-- refusing that pause would lose the sandbox.
-- +goose StatementBegin
CREATE FUNCTION sandbox_stored(state text, on_timeout text, saved boolean, memory_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state NOT IN ('stopped', 'error') AND (saved OR on_timeout = 'pause' OR state IN ('pausing', 'paused', 'resuming')) THEN memory_mib ELSE 0 END $$;
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
DROP FUNCTION sandbox_stored(text, integer);

-- What exists during the migration.
UPDATE team_usage SET stored_mib = 0;
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, stored_mib)
SELECT team_id, 0, 0, 0, 0, sum(stored) FROM (
    SELECT team_id, template_stored(state, size_bytes, disk_mib, memory_mib) AS stored FROM templates
    UNION ALL SELECT team_id, sandbox_stored(state, on_timeout, saved, memory_mib) FROM sandboxes
    UNION ALL SELECT team_id, mib(size_bytes) FROM build_archives) AS all_of_them
GROUP BY team_id
ON CONFLICT (team_id) DO UPDATE SET stored_mib = EXCLUDED.stored_mib;

-- +goose Down
-- +goose StatementBegin
CREATE FUNCTION sandbox_stored(state text, memory_mib integer) RETURNS integer LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE WHEN state IN ('pausing', 'paused', 'resuming') THEN memory_mib ELSE 0 END $$;
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
DROP TRIGGER sandboxes_saved ON sandboxes;
DROP FUNCTION sandbox_stored(text, text, boolean, integer), sandboxes_saved();
ALTER TABLE sandboxes DROP saved;
UPDATE team_usage SET stored_mib = 0;
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, stored_mib)
SELECT team_id, 0, 0, 0, 0, sum(stored) FROM (
    SELECT team_id, template_stored(state, size_bytes, disk_mib, memory_mib) AS stored FROM templates
    UNION ALL SELECT team_id, sandbox_stored(state, memory_mib) FROM sandboxes
    UNION ALL SELECT team_id, mib(size_bytes) FROM build_archives) AS all_of_them
GROUP BY team_id
ON CONFLICT (team_id) DO UPDATE SET stored_mib = EXCLUDED.stored_mib;

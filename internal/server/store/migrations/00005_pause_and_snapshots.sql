-- +goose Up

ALTER TABLE sandboxes
    -- What happens to a sandbox that was not used for its timeout.
    ADD COLUMN on_timeout text NOT NULL DEFAULT 'destroy' CHECK (on_timeout IN ('destroy', 'pause')),
    -- Whether a request or a call resumes it if it is paused.
    ADD COLUMN auto_resume boolean NOT NULL DEFAULT false,
    -- When it was paused.
    ADD COLUMN paused_at timestamptz,
    -- The sandbox that it was forked from. No reference, because it may outlive that row.
    ADD COLUMN forked_from uuid;

ALTER TABLE templates
    DROP CONSTRAINT templates_team_id_name_key,
    -- pending: being captured; deleting: not yet removed from all hosts.
    ADD COLUMN state text NOT NULL DEFAULT 'ready' CHECK (state IN ('pending', 'ready', 'deleting')),
    -- The size of its sandboxes; 0: each creation chooses.
    ADD COLUMN vcpus integer NOT NULL DEFAULT 0,
    ADD COLUMN memory_mib integer NOT NULL DEFAULT 0,
    -- The least disk size of its sandboxes.
    ADD COLUMN disk_mib integer NOT NULL DEFAULT 0,
    -- The sandbox that it was captured from.
    ADD COLUMN captured_from uuid,
    -- The server that captures or removes it.
    ADD COLUMN worker uuid;
-- The name of a template that is being deleted is free.
CREATE UNIQUE INDEX templates_name ON templates (team_id, name) WHERE state <> 'deleting';
CREATE INDEX templates_unsettled ON templates (id) WHERE state <> 'ready';

-- +goose Down
DROP INDEX templates_unsettled, templates_name;
DELETE FROM templates WHERE state <> 'ready';
ALTER TABLE templates
    DROP COLUMN state, DROP COLUMN vcpus, DROP COLUMN memory_mib, DROP COLUMN disk_mib, DROP COLUMN captured_from, DROP COLUMN worker,
    ADD CONSTRAINT templates_team_id_name_key UNIQUE (team_id, name);
UPDATE sandboxes SET state = 'stopping' WHERE state IN ('pausing', 'paused', 'resuming');
ALTER TABLE sandboxes
    DROP COLUMN on_timeout, DROP COLUMN auto_resume, DROP COLUMN paused_at, DROP COLUMN forked_from;

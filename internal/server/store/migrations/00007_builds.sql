-- +goose Up

ALTER TABLE templates
    -- layer: the state after a step of a build. It has no name, and only builds start
    -- from it.
    ADD COLUMN kind text NOT NULL DEFAULT 'template' CHECK (kind IN ('template', 'layer')),
    -- Counts the templates of one name.
    ADD COLUMN version integer NOT NULL DEFAULT 1,
    -- The build that makes or made it.
    ADD COLUMN build_id uuid,
    -- Digest of everything that a layer was made from.
    ADD COLUMN layer_key bytea,
    -- When a build last started from the layer.
    ADD COLUMN used_at timestamptz NOT NULL DEFAULT now();
DROP INDEX templates_name;
-- The version of a template that is being deleted is free.
CREATE UNIQUE INDEX templates_version ON templates (team_id, name, version) WHERE kind = 'template' AND state <> 'deleting';
CREATE INDEX templates_layer ON templates (team_id, layer_key) WHERE kind = 'layer';
CREATE INDEX templates_build ON templates (build_id) WHERE build_id IS NOT NULL;

-- name:tag is a template. A name alone means name:latest.
CREATE TABLE template_tags (
    team_id     uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    name        text NOT NULL,
    tag         text NOT NULL,
    template_id uuid NOT NULL REFERENCES templates ON DELETE CASCADE,
    PRIMARY KEY (team_id, name, tag)
);
CREATE INDEX template_tags_template ON template_tags (template_id);
INSERT INTO template_tags (team_id, name, tag, template_id)
SELECT team_id, name, 'latest', id FROM templates WHERE state <> 'deleting';

CREATE TABLE builds (
    id          uuid PRIMARY KEY,
    team_id     uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    -- The name of the template that it makes.
    name        text NOT NULL,
    tags        text[] NOT NULL,
    recipe      text NOT NULL,
    -- The archive of the folder that it copies from. NULL: it copies nothing.
    archive     text,
    options     jsonb NOT NULL,
    state       text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    total_steps integer NOT NULL,
    done_steps  integer NOT NULL DEFAULT 0,
    error       text NOT NULL DEFAULT '',
    -- The resulting template. No reference, because the build's row outlives it.
    template_id uuid,
    version     integer,
    -- The server that works on it, and the end of that server's lease.
    worker      uuid,
    lease_until timestamptz,
    attempts    integer NOT NULL DEFAULT 0,
    -- Somebody has cancelled it.
    cancelling  boolean NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL,
    started_at  timestamptz,
    ended_at    timestamptz
);
CREATE INDEX builds_team ON builds (team_id, created_at DESC, id DESC);
CREATE INDEX builds_version ON builds (team_id, name, version);
CREATE INDEX builds_open ON builds (created_at) WHERE state IN ('queued', 'running');

CREATE TABLE build_steps (
    build_id uuid NOT NULL REFERENCES builds ON DELETE CASCADE,
    number   integer NOT NULL,
    -- Phase, instruction, state, output, exit code and times.
    log      jsonb NOT NULL,
    PRIMARY KEY (build_id, number)
);

-- The archives of folders that builds copy from, named by their digest.
CREATE TABLE build_archives (
    team_id    uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    digest     text NOT NULL,
    size_bytes bigint NOT NULL,
    used_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, digest)
);
CREATE INDEX build_archives_age ON build_archives (used_at);
CREATE TABLE build_archive_chunks (
    team_id uuid NOT NULL,
    digest  text NOT NULL,
    number  integer NOT NULL,
    data    bytea NOT NULL,
    PRIMARY KEY (team_id, digest, number),
    FOREIGN KEY (team_id, digest) REFERENCES build_archives ON DELETE CASCADE
);

-- The build that a sandbox belongs to. Nobody else can use the sandbox.
ALTER TABLE sandboxes ADD COLUMN build_id uuid;
CREATE INDEX sandboxes_build ON sandboxes (build_id) WHERE build_id IS NOT NULL;
CREATE INDEX sandboxes_template_live ON sandboxes (template_id) WHERE state NOT IN ('stopped', 'error');

-- +goose Down
DROP INDEX sandboxes_template_live, sandboxes_build;
UPDATE sandboxes SET state = 'stopping' WHERE build_id IS NOT NULL AND state NOT IN ('stopped', 'error');
ALTER TABLE sandboxes DROP COLUMN build_id;
DROP TABLE build_archive_chunks, build_archives, build_steps, builds;
DELETE FROM templates WHERE kind = 'layer' OR NOT EXISTS (SELECT 1 FROM template_tags WHERE template_id = templates.id AND tag = 'latest');
DROP TABLE template_tags;
DROP INDEX templates_version, templates_layer, templates_build;
ALTER TABLE templates DROP COLUMN kind, DROP COLUMN version, DROP COLUMN build_id, DROP COLUMN layer_key, DROP COLUMN used_at;
CREATE UNIQUE INDEX templates_name ON templates (team_id, name) WHERE state <> 'deleting';

-- +goose Up

ALTER TABLE templates
    -- layer: what the steps of a build have made so far. It has no name and is
    -- nobody's to start from but a build's.
    ADD COLUMN kind text NOT NULL DEFAULT 'template' CHECK (kind IN ('template', 'layer')),
    -- Counts the templates of one name.
    ADD COLUMN version integer NOT NULL DEFAULT 1,
    -- The build that makes or made it.
    ADD COLUMN build_id uuid,
    -- Digest of all that a layer was made from.
    ADD COLUMN layer_key bytea,
    -- When a layer was last started from.
    ADD COLUMN used_at timestamptz NOT NULL DEFAULT now();
DROP INDEX templates_name;
-- The version of what is being removed is free.
CREATE UNIQUE INDEX templates_version ON templates (team_id, name, version) WHERE kind = 'template' AND state <> 'deleting';
CREATE INDEX templates_layer ON templates (team_id, layer_key) WHERE kind = 'layer';
CREATE INDEX templates_build ON templates (build_id) WHERE build_id IS NOT NULL;

-- What a name means: name:tag is a template. A name alone is name:latest.
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
    -- What the template is to be called.
    name        text NOT NULL,
    tags        text[] NOT NULL,
    recipe      text NOT NULL,
    -- The archive of the folder that it copies from; none: it copies nothing.
    archive     text,
    options     jsonb NOT NULL,
    state       text NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    total_steps integer NOT NULL,
    done_steps  integer NOT NULL DEFAULT 0,
    error       text NOT NULL DEFAULT '',
    -- What came of it. No reference: the build is remembered when that is gone.
    template_id uuid,
    version     integer,
    -- The server that works on it, and until when it is believed to.
    worker      uuid,
    lease_until timestamptz,
    attempts    integer NOT NULL DEFAULT 0,
    -- Somebody wants it to end.
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

-- The folders that builds copy from, as archives that are named by their content.
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

-- The build that a sandbox was made for, whose it is alone.
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

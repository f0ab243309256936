-- +goose Up

-- The built-in template, which every host makes. A host's report can confirm that the
-- host has it, but no report adds a template.
INSERT INTO templates (id, team_id, name, size_bytes, created_at)
VALUES ('00000000-0000-0000-0000-000000000000', '00000000-0000-0000-0000-000000000000', 'minimal', 0, now()) ON CONFLICT DO NOTHING;
INSERT INTO template_tags (team_id, name, tag, template_id)
SELECT team_id, name, 'latest', id FROM templates WHERE id = '00000000-0000-0000-0000-000000000000' ON CONFLICT DO NOTHING;

-- The rows of templates that a host lost. The template returns if an operator repairs
-- the files that the agent could not read.
CREATE TABLE lost_templates (
    host_id     uuid NOT NULL REFERENCES hosts ON DELETE CASCADE,
    template_id uuid NOT NULL,
    team_id     uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    kept        jsonb NOT NULL,
    lost_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (host_id, template_id)
);
CREATE INDEX lost_templates_team ON lost_templates (team_id);

-- template_found records that a host has a template again, and returns whether the host
-- had lost it. If another template has its version by now, it gets a new one.
-- +goose StatementBegin
CREATE FUNCTION template_found(host uuid, template uuid) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    was templates;
BEGIN
    -- Columns that are newer than the kept row have the built-in template's values.
    DELETE FROM lost_templates WHERE host_id = host AND template_id = template
    RETURNING (jsonb_populate_record((SELECT base FROM templates AS base WHERE base.id = '00000000-0000-0000-0000-000000000000'), lost_templates.kept)).* INTO was;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    was.worker := NULL;
    INSERT INTO templates SELECT was.* ON CONFLICT DO NOTHING;
    IF NOT EXISTS (SELECT 1 FROM templates WHERE id = template) THEN
        was.version := (SELECT max(version) + 1 FROM templates WHERE team_id = was.team_id AND name = was.name AND kind = was.kind);
        INSERT INTO templates SELECT was.*;
    END IF;
    -- Without a tag, a built version would be deleted.
    IF was.kind = 'template' THEN
        INSERT INTO template_tags (team_id, name, tag, template_id) VALUES (was.team_id, was.name, 'latest', template) ON CONFLICT DO NOTHING;
    END IF;
    INSERT INTO host_templates (host_id, template_id) VALUES (host, template) ON CONFLICT DO NOTHING;
    RETURN true;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION template_found;
DROP TABLE lost_templates;

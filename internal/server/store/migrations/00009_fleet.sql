-- +goose Up

ALTER TABLE sandboxes
    -- It was paused because its host drains, not because anybody asked for that:
    -- the next use resumes it, and the time after which it ends unused goes on.
    ADD drained boolean NOT NULL DEFAULT false;

-- For those that are being deleted too, which templates_name leaves out.
CREATE INDEX templates_team ON templates (team_id);

-- The first of them all is asked for.
CREATE INDEX sandbox_runs_started ON sandbox_runs (started_at);

-- +goose Down
DROP INDEX sandbox_runs_started, templates_team;
ALTER TABLE sandboxes DROP drained;

-- +goose Up

ALTER TABLE sandboxes
    -- The server paused it because its host drains. The next use resumes it, and its
    -- timeout continues.
    ADD drained boolean NOT NULL DEFAULT false;

-- Includes templates that are being deleted, unlike templates_name.
CREATE INDEX templates_team ON templates (team_id);

-- For finding the oldest run.
CREATE INDEX sandbox_runs_started ON sandbox_runs (started_at);

-- +goose Down
DROP INDEX sandbox_runs_started, templates_team;
ALTER TABLE sandboxes DROP drained;

-- +goose Up

ALTER TABLE sandboxes
    -- It was paused because its host drains, not because anybody asked for that:
    -- the next use resumes it, and the time after which it ends unused goes on.
    ADD drained boolean NOT NULL DEFAULT false;

-- +goose Down
ALTER TABLE sandboxes DROP drained;

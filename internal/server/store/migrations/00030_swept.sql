-- +goose Up

-- Audit records, times that sandboxes ran, and tags count as stored, too. They are
-- counted every few minutes, because they come with changes that nothing may refuse.
-- swept_bytes is the part of record_bytes that was counted so.
ALTER TABLE team_usage ADD swept_bytes bigint NOT NULL DEFAULT 0;

-- +goose Down
UPDATE team_usage SET record_bytes = record_bytes - swept_bytes;
ALTER TABLE team_usage DROP swept_bytes;

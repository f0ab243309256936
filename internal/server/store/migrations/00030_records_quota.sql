-- +goose Up

-- Audit records, the times that sandboxes ran, and tags count as stored, too. The server
-- counts them every few minutes, because they belong to changes that nothing may refuse.
-- swept_bytes is their part of record_bytes.
ALTER TABLE team_usage ADD swept_bytes bigint NOT NULL DEFAULT 0;

-- +goose Down
UPDATE team_usage SET record_bytes = record_bytes - swept_bytes;
ALTER TABLE team_usage DROP swept_bytes;

-- +goose Up
-- Refused requests of one actor and action in one minute are one record, which
-- the first of them wrote: count says how many, bucket which they are.
ALTER TABLE audit_records ADD COLUMN count bigint NOT NULL DEFAULT 1, ADD COLUMN bucket text;
CREATE UNIQUE INDEX audit_records_bucket ON audit_records (bucket) WHERE bucket IS NOT NULL;

-- +goose Down
DROP INDEX audit_records_bucket;
ALTER TABLE audit_records DROP COLUMN count, DROP COLUMN bucket;

-- +goose Up
-- Refused requests with the same actor, action and code in one minute share the record
-- of the first: count says how many they are, bucket identifies the record.
ALTER TABLE audit_records ADD COLUMN count bigint NOT NULL DEFAULT 1, ADD COLUMN bucket text;
CREATE UNIQUE INDEX audit_records_bucket ON audit_records (bucket) WHERE bucket IS NOT NULL;

-- +goose Down
DROP INDEX audit_records_bucket;
ALTER TABLE audit_records DROP COLUMN count, DROP COLUMN bucket;

-- +goose Up
-- Templates that are being deleted, of which there are few. The reconciler looks for
-- those that no host has any more.
CREATE INDEX templates_deleting ON templates (id) WHERE state = 'deleting';

-- +goose Down
DROP INDEX templates_deleting;

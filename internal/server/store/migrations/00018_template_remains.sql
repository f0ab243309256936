-- +goose Up
-- What is being removed, of which there is little at any time: the controller
-- looks for what no host has any more.
CREATE INDEX templates_deleting ON templates (id) WHERE state = 'deleting';

-- +goose Down
DROP INDEX templates_deleting;

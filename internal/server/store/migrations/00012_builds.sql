-- +goose Up

-- The credentials of the registry that a build starts from, encrypted; they are
-- forgotten when it has ended.
ALTER TABLE builds ADD registry bytea;

-- +goose Down
ALTER TABLE builds DROP registry;

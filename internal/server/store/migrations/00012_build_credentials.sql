-- +goose Up

-- The encrypted credentials for the registry of a build's image. They are deleted when
-- the build has ended.
ALTER TABLE builds ADD registry bytea;

-- +goose Down
ALTER TABLE builds DROP registry;

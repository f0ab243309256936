-- +goose Up

-- The host's problems, which its agent could not repair, as last reported: a list of
-- {kind, object, message, since}.
ALTER TABLE hosts ADD problems jsonb NOT NULL DEFAULT '[]';

-- +goose Down
ALTER TABLE hosts DROP problems;

-- +goose Up

-- What is wrong with a host and its agent could not repair, as the agent said
-- last: a list of {kind, object, message, since}.
ALTER TABLE hosts ADD problems jsonb NOT NULL DEFAULT '[]';

-- +goose Down
ALTER TABLE hosts DROP problems;

-- +goose Up

-- How much of a host's disk and network each sandbox of a template may use per second.
ALTER TABLE templates ADD limits jsonb NOT NULL DEFAULT '{}';

-- +goose Down
ALTER TABLE templates DROP limits;

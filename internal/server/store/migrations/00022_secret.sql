-- +goose Up

-- The installation's secret, from which tokens and the encryption of rows are derived,
-- encrypted under one of the keys of WRENN_SECRET_KEY. So a key can be replaced while
-- the secret, and everything derived from it, stays.
CREATE TABLE installation_secret (
    id     boolean PRIMARY KEY DEFAULT true CHECK (id),
    -- The key's id: the first 16 hexadecimal digits of its SHA-256.
    key_id text NOT NULL,
    sealed bytea NOT NULL
);

-- +goose Down
DROP TABLE installation_secret;

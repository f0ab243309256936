-- +goose Up

-- The installation's secret, which all tokens and sealed rows are made with,
-- encrypted under one of the keys of WRENN_SECRET_KEY. A key can be replaced
-- without the secret, and so without anything that was made with it.
CREATE TABLE installation_secret (
    id     boolean PRIMARY KEY DEFAULT true CHECK (id),
    -- The key's id: the first 16 hexadecimal digits of its SHA-256.
    key_id text NOT NULL,
    sealed bytea NOT NULL
);

-- +goose Down
DROP TABLE installation_secret;

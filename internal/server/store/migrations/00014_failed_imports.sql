-- +goose Up

-- Why the last import of a name failed, for clients that did not wait for the response.
-- A successful import of the name deletes the row.
CREATE TABLE failed_imports (
    team_id   uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    name      text NOT NULL,
    error     text NOT NULL,
    failed_at timestamptz NOT NULL,
    PRIMARY KEY (team_id, name)
);

-- +goose Down
DROP TABLE failed_imports;

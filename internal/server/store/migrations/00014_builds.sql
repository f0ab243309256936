-- +goose Up

-- Why the last import of a name has failed, for who did not wait for its answer.
-- There is none once an import of that name has succeeded.
CREATE TABLE failed_imports (
    team_id   uuid NOT NULL REFERENCES teams ON DELETE CASCADE,
    name      text NOT NULL,
    error     text NOT NULL,
    failed_at timestamptz NOT NULL,
    PRIMARY KEY (team_id, name)
);

-- +goose Down
DROP TABLE failed_imports;

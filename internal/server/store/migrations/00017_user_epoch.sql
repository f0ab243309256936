-- +goose Up

ALTER TABLE users
    -- Counts how often the user was deactivated or stopped being an admin. Streams that
    -- were opened under a lower number end, even if the user has the right again.
    ADD epoch integer NOT NULL DEFAULT 0;

-- +goose StatementBegin
CREATE FUNCTION count_revocation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.epoch := OLD.epoch + 1;
    RETURN NEW;
END $$;
-- +goose StatementEnd
CREATE TRIGGER count_revocation BEFORE UPDATE OF active, admin ON users FOR EACH ROW WHEN (OLD.active AND NOT NEW.active OR OLD.admin AND NOT NEW.admin) EXECUTE FUNCTION count_revocation();

-- +goose Down
DROP TRIGGER count_revocation ON users;
DROP FUNCTION count_revocation;
ALTER TABLE users DROP epoch;

-- +goose Up

-- wrenn_access notifies servers that a session, a key, a user or a team may do less
-- than before, so that they check its open requests again.
-- +goose StatementBegin
CREATE FUNCTION tell_access() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('wrenn_access', CASE TG_TABLE_NAME WHEN 'team_members' THEN (to_jsonb(OLD) ->> 'user_id') ELSE (to_jsonb(OLD) ->> 'id') END);
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER tell_access AFTER DELETE ON sessions FOR EACH ROW EXECUTE FUNCTION tell_access();
CREATE TRIGGER tell_access AFTER DELETE OR UPDATE OF scopes, expires_at ON api_keys FOR EACH ROW EXECUTE FUNCTION tell_access();
CREATE TRIGGER tell_access AFTER UPDATE OF active, admin ON users FOR EACH ROW WHEN (OLD.active AND NOT NEW.active OR OLD.admin AND NOT NEW.admin) EXECUTE FUNCTION tell_access();
CREATE TRIGGER tell_access AFTER DELETE OR UPDATE OF role ON team_members FOR EACH ROW EXECUTE FUNCTION tell_access();
CREATE TRIGGER tell_access AFTER UPDATE OF deleting_at ON teams FOR EACH ROW EXECUTE FUNCTION tell_access();

-- +goose Down
DROP TRIGGER tell_access ON teams;
DROP TRIGGER tell_access ON team_members;
DROP TRIGGER tell_access ON users;
DROP TRIGGER tell_access ON api_keys;
DROP TRIGGER tell_access ON sessions;
DROP FUNCTION tell_access;

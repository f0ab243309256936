-- +goose Up

ALTER TABLE sandboxes
    -- Counts how often the sandbox's tokens were revoked. Tokens with a lower number are
    -- invalid.
    ADD token_epoch integer NOT NULL DEFAULT 0;
CREATE TRIGGER tell_access AFTER UPDATE OF token_epoch ON sandboxes FOR EACH ROW WHEN (OLD.token_epoch <> NEW.token_epoch) EXECUTE FUNCTION tell_access();

-- revoke_tokens revokes the tokens of all sandboxes of teams, because somebody who may
-- no longer use them could have kept the tokens.
-- +goose StatementBegin
CREATE FUNCTION revoke_tokens(teams uuid[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- In the order in which every statement that changes several locks them.
    PERFORM FROM sandboxes WHERE team_id = ANY (teams) AND state NOT IN ('stopped', 'error') ORDER BY id FOR UPDATE;
    UPDATE sandboxes SET token_epoch = token_epoch + 1 WHERE team_id = ANY (teams) AND state NOT IN ('stopped', 'error');
END $$;
-- +goose StatementEnd
-- +goose StatementBegin
CREATE FUNCTION somebody_leaves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_TABLE_NAME = 'users' THEN
        PERFORM revoke_tokens(ARRAY(SELECT team_id FROM team_members WHERE user_id = NEW.id));
    ELSIF EXISTS (SELECT FROM teams WHERE id = OLD.team_id AND deleting_at IS NULL) THEN
        PERFORM revoke_tokens(ARRAY[OLD.team_id]);
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER revoke_tokens AFTER DELETE ON team_members FOR EACH ROW EXECUTE FUNCTION somebody_leaves();
CREATE TRIGGER revoke_tokens AFTER DELETE ON api_keys FOR EACH ROW EXECUTE FUNCTION somebody_leaves();
CREATE TRIGGER revoke_tokens AFTER UPDATE OF active ON users FOR EACH ROW WHEN (OLD.active AND NOT NEW.active) EXECUTE FUNCTION somebody_leaves();

-- +goose Down
DROP TRIGGER revoke_tokens ON users;
DROP TRIGGER revoke_tokens ON api_keys;
DROP TRIGGER revoke_tokens ON team_members;
DROP TRIGGER tell_access ON sandboxes;
DROP FUNCTION somebody_leaves, revoke_tokens;
ALTER TABLE sandboxes DROP token_epoch;

-- +goose Up

-- Nothing but the letter that asks is sent to an address before its recipient
-- has confirmed it.
ALTER TABLE channels
    -- Of mail alone. Null: not yet.
    ADD confirmed_at timestamptz,
    -- The SHA-256 of the token that the last letter had, and until when it is good.
    ADD confirm_hash bytea,
    ADD confirm_until timestamptz;
CREATE UNIQUE INDEX channels_confirm ON channels (confirm_hash);
-- An address that a member has verified as theirs stays confirmed.
UPDATE channels SET confirmed_at = now()
WHERE kind = 'email' AND EXISTS (
    SELECT FROM team_members JOIN users ON users.id = user_id
    WHERE team_members.team_id = channels.team_id AND verified_at IS NOT NULL AND lower(email) = lower(target));
DELETE FROM deliveries WHERE state = 'pending' AND channel_id IN (SELECT id FROM channels WHERE kind = 'email' AND confirmed_at IS NULL);

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION notify_channels(team uuid, what text, said jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO deliveries (id, channel_id, event, body)
    SELECT gen_random_uuid(), id, what, said FROM channels
    WHERE (team_id = team OR team IS NULL) AND enabled AND (kind <> 'email' OR confirmed_at IS NOT NULL) AND what = ANY (events);
    IF FOUND THEN
        PERFORM pg_notify('wrenn_deliveries', '');
    END IF;
END $$;
-- +goose StatementEnd

-- +goose Down
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION notify_channels(team uuid, what text, said jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO deliveries (id, channel_id, event, body)
    SELECT gen_random_uuid(), id, what, said FROM channels WHERE (team_id = team OR team IS NULL) AND enabled AND what = ANY (events);
    IF FOUND THEN
        PERFORM pg_notify('wrenn_deliveries', '');
    END IF;
END $$;
-- +goose StatementEnd
ALTER TABLE channels DROP confirmed_at, DROP confirm_hash, DROP confirm_until;

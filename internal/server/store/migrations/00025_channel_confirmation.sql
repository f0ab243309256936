-- +goose Up

-- Before its recipient has confirmed it, an address gets nothing but the mail that asks
-- for that.
ALTER TABLE channels
    -- For mail channels only. NULL: not confirmed yet.
    ADD confirmed_at timestamptz,
    -- SHA-256 of the token in the last mail, and the token's expiry.
    ADD confirm_hash bytea,
    ADD confirm_until timestamptz;
CREATE UNIQUE INDEX channels_confirm ON channels (confirm_hash);
-- Addresses that a member has verified are confirmed.
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

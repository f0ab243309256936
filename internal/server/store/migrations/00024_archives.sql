-- +goose Up

-- An archive is added with size 0, written, and charged when it gets its size, so
-- that the team's usage is not locked while it is written.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION archives_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, true) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM added GROUP BY team_id ORDER BY team_id) t
        WHERE t.stored <> 0;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, -t.stored, false) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, t.stored > 0) FROM (
            SELECT n.team_id, sum(mib(n.size_bytes) - mib(o.size_bytes))::bigint AS stored
            FROM removed o JOIN added n USING (team_id, digest) GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE t.stored <> 0;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- +goose Down
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION archives_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, true) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM added GROUP BY team_id ORDER BY team_id) t;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, -t.stored, false) FROM (SELECT team_id, sum(mib(size_bytes))::bigint AS stored FROM removed GROUP BY team_id ORDER BY team_id) t;
    ELSE
        PERFORM charge_team(t.team_id, 0, 0, 0, 0, t.stored, t.stored > 0) FROM (
            SELECT n.team_id, sum(mib(n.size_bytes) - mib(o.size_bytes))::bigint AS stored
            FROM removed o JOIN added n USING (team_id, digest) GROUP BY n.team_id ORDER BY n.team_id) t
        WHERE t.stored <> 0;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- +goose Up

-- Deliveries count as stored: an event can carry a sandbox's metadata to every channel of
-- its team. Like other records of changes, they are never refused themselves.
ALTER TABLE deliveries
    -- No reference: it would lock the team.
    ADD team_id uuid,
    -- What the row takes, with its entries in the indexes.
    ADD bytes bigint;
UPDATE deliveries SET team_id = channels.team_id, bytes = 512 + octet_length(body::text) FROM channels WHERE channels.id = deliveries.channel_id;
ALTER TABLE deliveries ALTER team_id SET NOT NULL, ALTER bytes SET NOT NULL;
INSERT INTO record_charges (team_id, bytes) SELECT team_id, sum(bytes) FROM deliveries GROUP BY team_id;

-- +goose StatementBegin
CREATE FUNCTION deliveries_measured() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.team_id := (SELECT team_id FROM channels WHERE id = NEW.channel_id);
    NEW.bytes := 512 + octet_length(NEW.body::text);
    RETURN NEW;
END $$;
-- +goose StatementEnd
CREATE TRIGGER deliveries_measured BEFORE INSERT ON deliveries FOR EACH ROW EXECUTE FUNCTION deliveries_measured();

-- +goose StatementBegin
CREATE FUNCTION deliveries_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO record_charges (team_id, bytes) SELECT a.team_id, sum(a.bytes)
        FROM added a WHERE EXISTS (SELECT FROM teams WHERE teams.id = a.team_id) GROUP BY a.team_id;
    ELSE
        INSERT INTO record_charges (team_id, bytes) SELECT r.team_id, -sum(r.bytes)
        FROM removed r WHERE EXISTS (SELECT FROM teams WHERE teams.id = r.team_id) GROUP BY r.team_id;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER records_added AFTER INSERT ON deliveries REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION deliveries_charge();
CREATE TRIGGER records_removed AFTER DELETE ON deliveries REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION deliveries_charge();

-- +goose Down
DROP TRIGGER records_added ON deliveries;
DROP TRIGGER records_removed ON deliveries;
DROP TRIGGER deliveries_measured ON deliveries;
DROP FUNCTION deliveries_charge, deliveries_measured;
INSERT INTO record_charges (team_id, bytes) SELECT team_id, -sum(bytes) FROM deliveries GROUP BY team_id;
ALTER TABLE deliveries DROP bytes, DROP team_id;

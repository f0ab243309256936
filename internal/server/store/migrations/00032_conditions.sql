-- +goose Up

ALTER TABLE sandboxes
    DROP CONSTRAINT sandboxes_end_reason_check,
    -- A sandbox that lost its memory and is not used again ends with the reason of the loss.
    ADD CONSTRAINT sandboxes_end_reason_check CHECK (end_reason IN ('deleted', 'expired', 'exited', 'oom', 'crashed', 'restarted', 'killed', 'lost', 'failed')),
    -- Who ended it, such as "user usr-…". Empty: nobody, or unknown.
    ADD ended_by text NOT NULL DEFAULT '',
    -- Its condition: unresponsive or memory_lost. Empty: none.
    ADD condition text NOT NULL DEFAULT '' CHECK (condition IN ('', 'unresponsive', 'memory_lost')),
    ADD condition_reason text NOT NULL DEFAULT '',
    -- The host's details, which can contain text of the guest.
    ADD condition_detail text NOT NULL DEFAULT '',
    ADD condition_since timestamptz;

-- Why a sandbox ended, as a text for users. No other place has these texts.
-- +goose StatementBegin
CREATE FUNCTION end_words(reason text, ended_by text) RETURNS text LANGUAGE sql IMMUTABLE AS
$$ SELECT CASE reason
    WHEN 'deleted' THEN CASE WHEN ended_by = '' THEN 'deleted' ELSE 'killed by ' || ended_by END
    WHEN 'expired' THEN 'timeout'
    WHEN 'exited' THEN 'exited'
    WHEN 'oom' THEN 'oom'
    WHEN 'crashed' THEN 'crashed'
    WHEN 'restarted' THEN 'restarted by itself'
    WHEN 'killed' THEN 'killed by its host'
    WHEN 'lost' THEN 'lost by its host'
    WHEN 'failed' THEN 'failed to start'
END $$;
-- +goose StatementEnd
ALTER TABLE sandboxes ADD ended_because text GENERATED ALWAYS AS (end_words(end_reason, ended_by)) STORED;

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_told() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    event  text;
    itself text;
BEGIN
    IF NEW.state = OLD.state AND NEW.condition = OLD.condition THEN
        RETURN NULL;
    END IF;
    event := CASE
        WHEN NEW.condition = 'memory_lost' AND OLD.condition <> 'memory_lost' THEN 'sandbox.memory_lost'
        WHEN NEW.state = OLD.state AND NEW.condition = 'unresponsive' THEN 'sandbox.unresponsive'
        WHEN NEW.state = OLD.state AND OLD.condition = 'unresponsive' THEN 'sandbox.responsive'
        WHEN NEW.state = OLD.state THEN NULL
        WHEN NEW.state = 'running' AND sandbox_is_starting(OLD.state) THEN 'sandbox.started'
        WHEN NEW.state = 'paused' THEN 'sandbox.paused'
        WHEN NEW.state = 'error' THEN 'sandbox.failed'
        WHEN NEW.state = 'stopped' AND NEW.end_reason = 'lost' THEN 'sandbox.lost'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'stopped' THEN 'sandbox.ended'
    END;
    IF event IS NOT NULL THEN
        PERFORM notify_channels(NEW.team_id, event, jsonb_build_object('sandbox', NEW.id, 'template', NEW.template_name, 'state', NEW.state,
            'reason', COALESCE(NEW.end_reason, NULLIF(NEW.condition_reason, '')), 'ended_because', NEW.ended_because,
            'error', COALESCE(NULLIF(NEW.error, ''), NULLIF(NEW.condition_detail, '')), 'metadata', NEW.metadata, 'at', now()));
    END IF;
    itself := CASE
        WHEN NEW.condition = 'memory_lost' AND OLD.condition <> 'memory_lost' THEN 'sandbox.memory_lost'
        WHEN NEW.state = OLD.state AND NEW.condition = 'unresponsive' THEN 'sandbox.unresponsive'
        WHEN NEW.state = OLD.state AND OLD.condition = 'unresponsive' THEN 'sandbox.responsive'
        WHEN NEW.state = OLD.state THEN NULL
        WHEN NEW.state = 'stopped' AND NEW.end_reason NOT IN ('deleted', 'failed') THEN 'sandbox.' || NEW.end_reason
        WHEN NEW.state = 'paused' AND OLD.state IN ('running', 'missing') THEN 'sandbox.paused'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'running' AND OLD.state = 'missing' THEN 'sandbox.found'
    END;
    IF itself IS NOT NULL THEN
        INSERT INTO audit_records (id, at, team_id, actor, actor_id, action, object, object_id, address, request_id, result, code)
        SELECT gen_random_uuid(), now(), NEW.team_id, by_host.actor, CASE by_host.actor WHEN 'host' THEN NEW.host_id END, itself, 'sandbox', NEW.id::text, '', '', 'ok', ''
        FROM (SELECT CASE WHEN itself IN ('sandbox.missing', 'sandbox.found', 'sandbox.lost') THEN 'platform' ELSE 'host' END AS actor) by_host;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
DROP TRIGGER sandboxes_told ON sandboxes;
CREATE TRIGGER sandboxes_told AFTER UPDATE OF state, condition ON sandboxes
    FOR EACH ROW EXECUTE FUNCTION sandboxes_told();

-- +goose Down
DROP TRIGGER sandboxes_told ON sandboxes;
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION sandboxes_told() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    event  text;
    itself text;
BEGIN
    IF NEW.state = OLD.state THEN
        RETURN NULL;
    END IF;
    event := CASE
        WHEN NEW.state = 'running' AND sandbox_is_starting(OLD.state) THEN 'sandbox.started'
        WHEN NEW.state = 'paused' THEN 'sandbox.paused'
        WHEN NEW.state = 'error' THEN 'sandbox.failed'
        WHEN NEW.state = 'stopped' AND NEW.end_reason = 'lost' THEN 'sandbox.lost'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'stopped' THEN 'sandbox.ended'
    END;
    IF event IS NOT NULL THEN
        PERFORM notify_channels(NEW.team_id, event, jsonb_build_object('sandbox', NEW.id, 'template', NEW.template_name, 'state', NEW.state,
            'reason', NEW.end_reason, 'error', NULLIF(NEW.error, ''), 'metadata', NEW.metadata, 'at', now()));
    END IF;
    itself := CASE
        WHEN NEW.state = 'stopped' AND NEW.end_reason IN ('expired', 'exited', 'lost') THEN 'sandbox.' || NEW.end_reason
        WHEN NEW.state = 'paused' AND OLD.state IN ('running', 'missing') THEN 'sandbox.paused'
        WHEN NEW.state = 'missing' THEN 'sandbox.missing'
        WHEN NEW.state = 'running' AND OLD.state = 'missing' THEN 'sandbox.found'
    END;
    IF itself IS NOT NULL THEN
        INSERT INTO audit_records (id, at, team_id, actor, actor_id, action, object, object_id, address, request_id, result, code)
        SELECT gen_random_uuid(), now(), NEW.team_id, by_host.actor, CASE by_host.actor WHEN 'host' THEN NEW.host_id END, itself, 'sandbox', NEW.id::text, '', '', 'ok', ''
        FROM (SELECT CASE WHEN itself IN ('sandbox.expired', 'sandbox.exited', 'sandbox.paused') THEN 'host' ELSE 'platform' END AS actor) by_host;
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_told AFTER UPDATE OF state ON sandboxes
    FOR EACH ROW EXECUTE FUNCTION sandboxes_told();
UPDATE sandboxes SET end_reason = 'exited' WHERE end_reason IN ('oom', 'crashed', 'restarted', 'killed');
ALTER TABLE sandboxes DROP ended_because;
DROP FUNCTION end_words;
ALTER TABLE sandboxes
    DROP condition_since, DROP condition_detail, DROP condition_reason, DROP condition, DROP ended_by,
    DROP CONSTRAINT sandboxes_end_reason_check,
    ADD CONSTRAINT sandboxes_end_reason_check CHECK (end_reason IN ('deleted', 'expired', 'exited', 'lost', 'failed'));

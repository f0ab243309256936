-- +goose Up

ALTER TABLE hosts
    -- None until its agent registers, and again once it is deleted.
    ALTER url DROP NOT NULL,
    ADD name text NOT NULL DEFAULT '',
    ADD tags text[] NOT NULL DEFAULT '{}',
    -- Its agent registers itself and sends heartbeats; else the server's own
    -- configuration names it.
    ADD enrolled boolean NOT NULL DEFAULT false,
    -- It gets no new sandboxes.
    ADD draining boolean NOT NULL DEFAULT false,
    -- Set: it is gone. The row stays for the sandboxes that were on it.
    ADD deleted_at timestamptz,
    -- SHA-256 of the token that its agent may register with, and until when.
    ADD registration_hash bytea,
    ADD registration_expires_at timestamptz,
    -- SHA-256 of the refresh token that holds, and of the one before it. None:
    -- not registered, or revoked.
    ADD refresh_hash bytea,
    ADD previous_hash bytea,
    -- Counts registrations and revocations; tokens of an earlier one are void.
    ADD epoch integer NOT NULL DEFAULT 0,
    -- When the agent last said that it is there (last_seen_at: when it last answered).
    ADD heartbeat_at timestamptz,
    -- What sandboxes may have together; 0: not known.
    ADD capacity_mib bigint NOT NULL DEFAULT 0,
    ADD slots integer NOT NULL DEFAULT 0,
    ADD network_block integer NOT NULL DEFAULT 0,
    -- What is in use, as the agent said last.
    ADD sandboxes integer NOT NULL DEFAULT 0,
    ADD used_memory_mib bigint NOT NULL DEFAULT 0,
    ADD used_vcpus integer NOT NULL DEFAULT 0,
    ADD disk_free_bytes bigint NOT NULL DEFAULT 0,
    -- The server that listens to the host and compares it with the table.
    ADD watcher uuid;
CREATE UNIQUE INDEX hosts_registration ON hosts (registration_hash);
CREATE UNIQUE INDEX hosts_refresh ON hosts (refresh_hash);
CREATE INDEX hosts_previous ON hosts (previous_hash);

-- The leaves that hosts may show. What is not here is not trusted, whoever signed it.
CREATE TABLE host_certificates (
    -- Serial number, in hexadecimal.
    serial     text PRIMARY KEY,
    host_id    uuid NOT NULL REFERENCES hosts ON DELETE CASCADE,
    not_after  timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX host_certificates_host ON host_certificates (host_id, created_at DESC);

-- The control plane's processes. One that was not seen for a while is dead,
-- and what it was at work on is anybody's.
CREATE TABLE servers (
    id      uuid PRIMARY KEY,
    seen_at timestamptz NOT NULL
);

ALTER TABLE sandboxes
    DROP CONSTRAINT sandboxes_state_check,
    -- missing: it ran when its host was last heard of.
    ADD CONSTRAINT sandboxes_state_check CHECK (state IN ('pending', 'starting', 'running', 'missing', 'pausing', 'paused', 'resuming', 'stopping', 'stopped', 'error')),
    -- The server that is at work on a sandbox in transit. Kept by a trigger, so
    -- that no statement can forget it.
    ADD worker uuid;
-- +goose StatementBegin
CREATE FUNCTION sandboxes_worker() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.worker = CASE WHEN NEW.state IN ('pending', 'starting', 'pausing', 'resuming', 'stopping')
        THEN NULLIF(current_setting('wrenn.server', true), '')::uuid END;
    RETURN NEW;
END $$;
-- +goose StatementEnd
CREATE TRIGGER sandboxes_worker BEFORE INSERT OR UPDATE OF state ON sandboxes
    FOR EACH ROW EXECUTE FUNCTION sandboxes_worker();

-- +goose Down
DROP TRIGGER sandboxes_worker ON sandboxes;
DROP FUNCTION sandboxes_worker;
UPDATE sandboxes SET state = 'running' WHERE state = 'missing';
ALTER TABLE sandboxes
    DROP worker, DROP CONSTRAINT sandboxes_state_check,
    ADD CONSTRAINT sandboxes_state_check CHECK (state IN ('pending', 'starting', 'running', 'pausing', 'paused', 'resuming', 'stopping', 'stopped', 'error'));
DROP TABLE servers, host_certificates;
DROP INDEX hosts_registration, hosts_refresh, hosts_previous;
UPDATE hosts SET url = 'deleted:' || id WHERE url IS NULL;
ALTER TABLE hosts
    ALTER url SET NOT NULL, DROP name, DROP tags, DROP enrolled, DROP draining, DROP deleted_at,
    DROP registration_hash, DROP registration_expires_at, DROP refresh_hash, DROP previous_hash, DROP epoch, DROP heartbeat_at,
    DROP capacity_mib, DROP slots, DROP network_block, DROP sandboxes, DROP used_memory_mib, DROP used_vcpus, DROP disk_free_bytes, DROP watcher;

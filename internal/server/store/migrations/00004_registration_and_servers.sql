-- +goose Up

ALTER TABLE hosts
    -- NULL until its agent registers, and after the host is deleted.
    ALTER url DROP NOT NULL,
    ADD name text NOT NULL DEFAULT '',
    ADD tags text[] NOT NULL DEFAULT '{}',
    -- true: its agent registers itself and sends heartbeats. false: the server's
    -- configuration names the host.
    ADD enrolled boolean NOT NULL DEFAULT false,
    -- It gets no new sandboxes.
    ADD draining boolean NOT NULL DEFAULT false,
    -- NULL: it exists. The row of a deleted host stays, for its sandboxes' rows.
    ADD deleted_at timestamptz,
    -- SHA-256 of the token with which its agent may register, and the token's expiry.
    ADD registration_hash bytea,
    ADD registration_expires_at timestamptz,
    -- SHA-256 of the valid refresh token, and of the one before it. NULL: not
    -- registered, or revoked.
    ADD refresh_hash bytea,
    ADD previous_hash bytea,
    -- Counts registrations and revocations. Tokens with a lower epoch are invalid.
    ADD epoch integer NOT NULL DEFAULT 0,
    -- The agent's last heartbeat (last_seen_at: its last answer to a call).
    ADD heartbeat_at timestamptz,
    -- Limits for all sandboxes together; 0: not known.
    ADD capacity_mib bigint NOT NULL DEFAULT 0,
    ADD slots integer NOT NULL DEFAULT 0,
    ADD network_block integer NOT NULL DEFAULT 0,
    -- Use, as the agent last reported it.
    ADD sandboxes integer NOT NULL DEFAULT 0,
    ADD used_memory_mib bigint NOT NULL DEFAULT 0,
    ADD used_vcpus integer NOT NULL DEFAULT 0,
    ADD disk_free_bytes bigint NOT NULL DEFAULT 0,
    -- The server that watches the host: it follows its events and reconciles it.
    ADD watcher uuid;
CREATE UNIQUE INDEX hosts_registration ON hosts (registration_hash);
CREATE UNIQUE INDEX hosts_refresh ON hosts (refresh_hash);
CREATE INDEX hosts_previous ON hosts (previous_hash);

-- The valid leaf certificates of hosts. The server trusts no other, whoever signed it.
CREATE TABLE host_certificates (
    -- Serial number, in hexadecimal.
    serial     text PRIMARY KEY,
    host_id    uuid NOT NULL REFERENCES hosts ON DELETE CASCADE,
    not_after  timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX host_certificates_host ON host_certificates (host_id, created_at DESC);

-- The control plane's processes. One that has not reported for a while is dead, and
-- any other server may take over its work.
CREATE TABLE servers (
    id      uuid PRIMARY KEY,
    seen_at timestamptz NOT NULL
);

ALTER TABLE sandboxes
    DROP CONSTRAINT sandboxes_state_check,
    -- missing: it ran when its host last reported.
    ADD CONSTRAINT sandboxes_state_check CHECK (state IN ('pending', 'starting', 'running', 'missing', 'pausing', 'paused', 'resuming', 'stopping', 'stopped', 'error')),
    -- The server that works on a sandbox in transit. A trigger sets it, so that no
    -- statement can forget it.
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

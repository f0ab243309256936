-- name: UpsertHost :one
-- Adds or returns the host from the server's configuration.
INSERT INTO hosts (id, url, status) VALUES ($1, $2, 'pending')
ON CONFLICT (url) DO UPDATE SET url = EXCLUDED.url
RETURNING *;

-- name: InsertHost :one
-- Adds a host that will register itself.
INSERT INTO hosts (id, name, tags, status, enrolled, registration_hash, registration_expires_at)
VALUES ($1, $2, $3, 'pending', true, $4, $5)
RETURNING *;

-- name: GetHost :one
SELECT * FROM hosts WHERE id = $1 AND deleted_at IS NULL;

-- name: ListHosts :many
-- Not paginated: there are few hosts, and every server needs all.
SELECT * FROM hosts WHERE deleted_at IS NULL ORDER BY created_at, id;

-- name: RenewHostRegistration :one
UPDATE hosts SET registration_hash = @registration_hash, registration_expires_at = @registration_expires_at
WHERE id = @id AND enrolled AND deleted_at IS NULL RETURNING *;

-- name: LockHostByRegistration :one
SELECT * FROM hosts WHERE registration_hash = @registration_hash AND registration_expires_at > now() AND deleted_at IS NULL FOR NO KEY UPDATE;

-- name: RegisterHost :one
UPDATE hosts SET url = @url, refresh_hash = @refresh_hash, previous_hash = @previous_hash, epoch = epoch + 1, heartbeat_at = now(),
    version = @version, vmm = @vmm, accelerator = @accelerator, cpus = @cpus, memory_bytes = @memory_bytes, disk_bytes = @disk_bytes,
    capacity_mib = @capacity_mib, slots = @slots, network_block = @network_block
WHERE id = @id RETURNING *;

-- name: EndHostRegistration :exec
-- The agent has proved that it received its credentials.
UPDATE hosts SET registration_hash = NULL, registration_expires_at = NULL WHERE id = $1;

-- name: LockHostByRefresh :one
SELECT * FROM hosts WHERE (refresh_hash = @hash OR previous_hash = @hash) AND deleted_at IS NULL FOR NO KEY UPDATE;

-- name: RotateHostRefresh :exec
UPDATE hosts SET refresh_hash = @next, previous_hash = refresh_hash WHERE id = @id;

-- name: RevokeHost :exec
UPDATE hosts SET refresh_hash = NULL, previous_hash = NULL, epoch = epoch + 1, status = 'offline', heartbeat_at = NULL WHERE id = $1;

-- name: DeleteHost :exec
UPDATE hosts SET deleted_at = now(), url = NULL, status = 'offline', registration_hash = NULL, refresh_hash = NULL, previous_hash = NULL,
    epoch = epoch + 1, watcher = NULL
WHERE id = $1;

-- name: UpdateHost :one
UPDATE hosts SET draining = COALESCE(sqlc.narg('draining'), draining), name = COALESCE(sqlc.narg('name'), name), tags = COALESCE(sqlc.narg('tags')::text[], tags)
WHERE id = @id AND deleted_at IS NULL RETURNING *;

-- name: InsertHostCertificate :exec
INSERT INTO host_certificates (serial, host_id, not_after) VALUES ($1, $2, $3);

-- name: PruneHostCertificates :exec
-- Keeps the newest ones: a host that missed a response continues with the previous
-- certificate.
DELETE FROM host_certificates WHERE host_certificates.serial = ANY (ARRAY(
    SELECT old.serial FROM host_certificates old WHERE old.host_id = @host_id AND old.serial NOT IN (
        SELECT c.serial FROM host_certificates c WHERE c.host_id = @host_id AND c.not_after > now() ORDER BY c.created_at DESC LIMIT 3)
    ORDER BY old.serial FOR UPDATE));

-- name: DropHostCertificates :exec
DELETE FROM host_certificates WHERE host_certificates.serial = ANY (ARRAY(
    SELECT c.serial FROM host_certificates c WHERE c.host_id = $1 ORDER BY c.serial FOR UPDATE));

-- name: TrustsHostCertificate :one
SELECT EXISTS (SELECT 1 FROM host_certificates WHERE serial = @serial AND host_id = @host_id AND not_after > now());

-- name: HostBeat :one
-- A heartbeat does not show that the server can call the agent.
UPDATE hosts SET heartbeat_at = now(), version = @version, vmm = @vmm, accelerator = @accelerator, cpus = @cpus,
    memory_bytes = @memory_bytes, disk_bytes = @disk_bytes, capacity_mib = @capacity_mib, slots = @slots, network_block = @network_block,
    sandboxes = @sandboxes, used_memory_mib = @used_memory_mib, used_vcpus = @used_vcpus, disk_free_bytes = @disk_free_bytes
WHERE id = @id AND epoch = @epoch AND refresh_hash IS NOT NULL AND deleted_at IS NULL RETURNING *;

-- name: HostLeaves :execrows
UPDATE hosts SET heartbeat_at = NULL, status = 'offline'
WHERE id = @id AND epoch = @epoch AND refresh_hash IS NOT NULL AND deleted_at IS NULL;

-- name: HostSeen :one
-- The host responded to a call. If its heartbeats have stopped, it stays unreachable
-- until they resume.
UPDATE hosts SET last_seen_at = now(), version = @version, vmm = @vmm, accelerator = @accelerator, cpus = @cpus, memory_bytes = @memory_bytes, disk_bytes = @disk_bytes,
    capacity_mib = @capacity_mib, slots = @slots, network_block = @network_block,
    sandboxes = @sandboxes, used_memory_mib = @used_memory_mib, used_vcpus = @used_vcpus, disk_free_bytes = @disk_free_bytes, problems = @problems,
    status = CASE WHEN enrolled AND COALESCE(heartbeat_at < now() - make_interval(secs => @within::float8), true) THEN status ELSE 'online' END
WHERE id = @id AND deleted_at IS NULL RETURNING *;

-- name: HostsUnreachable :many
-- Marks unreachable the hosts that have neither responded nor sent a heartbeat for too
-- long. Times in the future are from before the clock was set back and are ignored.
UPDATE hosts SET status = 'unreachable'
WHERE hosts.id = ANY (ARRAY(
    SELECT h.id FROM hosts h WHERE h.status = 'online' AND h.deleted_at IS NULL
      AND (h.last_seen_at NOT BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8)
        OR h.enrolled AND h.heartbeat_at NOT BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8))
    ORDER BY h.id FOR NO KEY UPDATE))
RETURNING hosts.id, hosts.name, hosts.url;

-- name: SandboxesMissing :many
-- Marks missing what ran on unreachable hosts. Reconciliation finds it again.
UPDATE sandboxes SET state = 'missing'
WHERE sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.state = 'running' AND s.host_id IN (SELECT hosts.id FROM hosts WHERE hosts.status IN ('unreachable', 'offline') AND hosts.deleted_at IS NULL)
    ORDER BY s.id FOR NO KEY UPDATE OF s))
RETURNING sandboxes.id;

-- name: ListPlaces :many
-- The hosts that may take a sandbox of a template, with what they have already.
SELECT hosts.id, hosts.tags, hosts.capacity_mib, hosts.cpus, hosts.slots, hosts.disk_bytes, hosts.disk_free_bytes,
    COALESCE(used.sandboxes, 0)::bigint AS sandboxes, COALESCE(used.memory_mib, 0)::bigint AS memory_mib, COALESCE(used.vcpus, 0)::bigint AS vcpus,
    COALESCE(used.promised_mib, 0)::bigint AS promised_mib
FROM hosts
JOIN host_templates ON host_templates.host_id = hosts.id AND host_templates.template_id = @template_id
LEFT JOIN LATERAL (
    SELECT count(*) AS sandboxes, sum(sandboxes.memory_mib) AS memory_mib, sum(sandboxes.vcpus) AS vcpus,
        sum(sandboxes.memory_mib) FILTER (WHERE sandboxes.on_timeout = 'pause' AND NOT sandboxes.saved) AS promised_mib FROM sandboxes
    WHERE sandboxes.host_id = hosts.id AND sandbox_uses_host(sandboxes.state)) used ON true
WHERE hosts.status = 'online' AND NOT hosts.draining AND hosts.deleted_at IS NULL;

-- name: LockPlace :one
-- Locks until the transaction ends, so that servers reserve on one host one after
-- another.
SELECT id, tags, capacity_mib, cpus, slots, disk_bytes, disk_free_bytes FROM hosts
WHERE id = $1 AND status = 'online' AND NOT draining AND deleted_at IS NULL FOR NO KEY UPDATE;

-- name: UsedPlace :one
-- Promised is the disk space that pauses after timeouts will take.
SELECT count(*) AS sandboxes, COALESCE(sum(memory_mib), 0)::bigint AS memory_mib, COALESCE(sum(vcpus), 0)::bigint AS vcpus,
    COALESCE(sum(memory_mib) FILTER (WHERE on_timeout = 'pause' AND NOT saved), 0)::bigint AS promised_mib FROM sandboxes
WHERE host_id = $1 AND sandbox_uses_host(state);

-- name: SandboxMoves :one
-- Moves a starting sandbox to another host.
UPDATE sandboxes SET host_id = @to_host WHERE id = @id AND state = 'starting' AND host_id = @from_host RETURNING *;

-- name: SandboxFound :one
-- Its host is reachable again and has it.
UPDATE sandboxes SET state = 'running', expires_at = @expires_at
WHERE sandboxes.id = @id AND sandboxes.host_id = @host_id AND state = 'missing' AND EXISTS (SELECT 1 FROM hosts WHERE hosts.id = sandboxes.host_id AND hosts.status = 'online') RETURNING *;

-- name: CountHostLoses :many
-- The sandboxes that deleting a host would lose.
SELECT state, count(*) AS n FROM sandboxes WHERE host_id = $1 AND sandbox_is_live(state) GROUP BY state;

-- name: CountHostOnlyTemplates :one
-- Counts teams' templates that no other host has.
SELECT count(*) FROM host_templates JOIN templates ON templates.id = template_id
WHERE host_templates.host_id = $1 AND team_id <> '00000000-0000-0000-0000-000000000000'
  AND NOT EXISTS (SELECT 1 FROM host_templates o WHERE o.template_id = host_templates.template_id AND o.host_id <> host_templates.host_id);

-- name: LoseHostSandboxes :many
UPDATE sandboxes SET state = 'stopped', end_reason = 'lost', error = 'its host was removed', ended_at = now()
WHERE sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.host_id = $1 AND sandbox_is_live(s.state) ORDER BY s.id FOR NO KEY UPDATE)) RETURNING sandboxes.id;

-- name: DropTemplatesOfHost :exec
-- Also deletes teams' templates that are on no host afterwards, which frees their names.
-- Locks templates before the rows of what hosts have, as deleting a template does.
WITH going AS MATERIALIZED (
    SELECT t.id FROM templates t JOIN host_templates has ON has.template_id = t.id
    WHERE has.host_id = $1 AND t.team_id <> '00000000-0000-0000-0000-000000000000'
      AND NOT EXISTS (SELECT 1 FROM host_templates o WHERE o.template_id = t.id AND o.host_id <> $1)
    ORDER BY t.id FOR UPDATE OF t),
dropped AS (DELETE FROM host_templates WHERE host_templates.host_id = $1 AND (SELECT count(*) FROM going) >= 0 AND host_templates.template_id = ANY (ARRAY(
    SELECT has.template_id FROM host_templates has WHERE has.host_id = $1 ORDER BY has.template_id FOR UPDATE))),
forgotten AS (DELETE FROM lost_templates WHERE lost_templates.host_id = $1 AND lost_templates.template_id = ANY (ARRAY(
    SELECT lost.template_id FROM lost_templates lost WHERE lost.host_id = $1 ORDER BY lost.template_id FOR UPDATE)))
DELETE FROM templates WHERE templates.id = ANY (ARRAY(SELECT going.id FROM going));

-- name: LockHost :one
SELECT id FROM hosts WHERE id = $1 FOR NO KEY UPDATE;

-- name: CountOnlineHosts :one
SELECT count(*) FROM hosts WHERE status = 'online' AND deleted_at IS NULL;

-- name: CountHosts :many
SELECT status, draining, count(*) AS n FROM hosts WHERE deleted_at IS NULL GROUP BY status, draining;

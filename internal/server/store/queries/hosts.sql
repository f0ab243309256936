-- name: UpsertHost :one
-- The host that the server's configuration names.
INSERT INTO hosts (id, url, status) VALUES ($1, $2, 'pending')
ON CONFLICT (url) DO UPDATE SET url = EXCLUDED.url
RETURNING *;

-- name: InsertHost :one
-- A host that is to register itself.
INSERT INTO hosts (id, name, tags, status, enrolled, registration_hash, registration_expires_at)
VALUES ($1, $2, $3, 'pending', true, $4, $5)
RETURNING *;

-- name: GetHost :one
SELECT * FROM hosts WHERE id = $1 AND deleted_at IS NULL;

-- name: ListHosts :many
-- There are few: every server knows them all.
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
-- Its agent has shown that it got its credentials.
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
-- The newest stay: a host whose answer got lost goes on with the one before.
DELETE FROM host_certificates old WHERE old.host_id = @host_id AND old.serial NOT IN (
    SELECT c.serial FROM host_certificates c WHERE c.host_id = @host_id AND c.not_after > now() ORDER BY c.created_at DESC LIMIT 3);

-- name: DropHostCertificates :exec
DELETE FROM host_certificates WHERE host_id = $1;

-- name: TrustsHostCertificate :one
SELECT EXISTS (SELECT 1 FROM host_certificates WHERE serial = @serial AND host_id = @host_id AND not_after > now());

-- name: HostBeat :one
-- The agent says that it is there. Whether it can be called is another matter.
UPDATE hosts SET heartbeat_at = now(), version = @version, vmm = @vmm, accelerator = @accelerator, cpus = @cpus,
    memory_bytes = @memory_bytes, disk_bytes = @disk_bytes, capacity_mib = @capacity_mib, slots = @slots, network_block = @network_block,
    sandboxes = @sandboxes, used_memory_mib = @used_memory_mib, used_vcpus = @used_vcpus, disk_free_bytes = @disk_free_bytes
WHERE id = @id AND epoch = @epoch AND refresh_hash IS NOT NULL AND deleted_at IS NULL RETURNING *;

-- name: HostLeaves :execrows
UPDATE hosts SET heartbeat_at = NULL, status = 'offline'
WHERE id = @id AND epoch = @epoch AND refresh_hash IS NOT NULL AND deleted_at IS NULL;

-- name: HostSeen :one
-- It answered. One whose heartbeats stopped is not back before they come again.
UPDATE hosts SET last_seen_at = now(), version = @version, vmm = @vmm, accelerator = @accelerator, cpus = @cpus, memory_bytes = @memory_bytes, disk_bytes = @disk_bytes,
    capacity_mib = @capacity_mib, slots = @slots, network_block = @network_block,
    sandboxes = @sandboxes, used_memory_mib = @used_memory_mib, used_vcpus = @used_vcpus, disk_free_bytes = @disk_free_bytes, problems = @problems,
    status = CASE WHEN enrolled AND COALESCE(heartbeat_at < now() - make_interval(secs => @within::float8), true) THEN status ELSE 'online' END
WHERE id = @id AND deleted_at IS NULL RETURNING *;

-- name: HostsUnreachable :many
-- Those that neither answered nor said that they are there for too long. A time
-- that is yet to come is from before the clock was set back, and says nothing.
UPDATE hosts SET status = 'unreachable'
WHERE status = 'online' AND deleted_at IS NULL
  AND (last_seen_at NOT BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8)
    OR enrolled AND heartbeat_at NOT BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8))
RETURNING id, name, url;

-- name: SandboxesMissing :many
-- What ran on hosts that are gone. It is found again by whoever compares the host.
UPDATE sandboxes SET state = 'missing'
WHERE state = 'running' AND host_id IN (SELECT id FROM hosts WHERE status IN ('unreachable', 'offline') AND deleted_at IS NULL)
RETURNING id;

-- name: ListPlaces :many
-- The hosts that may take a sandbox of a template, and what they have already.
SELECT hosts.id, hosts.tags, hosts.capacity_mib, hosts.cpus, hosts.slots,
    COALESCE(used.sandboxes, 0)::bigint AS sandboxes, COALESCE(used.memory_mib, 0)::bigint AS memory_mib, COALESCE(used.vcpus, 0)::bigint AS vcpus
FROM hosts
JOIN host_templates ON host_templates.host_id = hosts.id AND host_templates.template_id = @template_id
LEFT JOIN LATERAL (
    SELECT count(*) AS sandboxes, sum(sandboxes.memory_mib) AS memory_mib, sum(sandboxes.vcpus) AS vcpus FROM sandboxes
    WHERE sandboxes.host_id = hosts.id AND sandboxes.state NOT IN ('stopped', 'error') AND sandboxes.state <> 'paused') used ON true
WHERE hosts.status = 'online' AND NOT hosts.draining AND hosts.deleted_at IS NULL;

-- name: LockPlace :one
-- Held to the end of the transaction: of servers that reserve on one host, one after the other does.
SELECT id, tags, capacity_mib, cpus, slots FROM hosts
WHERE id = $1 AND status = 'online' AND NOT draining AND deleted_at IS NULL FOR NO KEY UPDATE;

-- name: UsedPlace :one
SELECT count(*) AS sandboxes, COALESCE(sum(memory_mib), 0)::bigint AS memory_mib, COALESCE(sum(vcpus), 0)::bigint AS vcpus FROM sandboxes
WHERE host_id = $1 AND state NOT IN ('stopped', 'error') AND state <> 'paused';

-- name: SandboxMoves :one
-- It could not start on one host and is tried on another.
UPDATE sandboxes SET host_id = @to_host WHERE id = @id AND state = 'starting' AND host_id = @from_host RETURNING *;

-- name: SandboxFound :one
-- Its host is back and has it.
UPDATE sandboxes SET state = 'running', expires_at = @expires_at
WHERE sandboxes.id = @id AND sandboxes.host_id = @host_id AND state = 'missing' AND EXISTS (SELECT 1 FROM hosts WHERE hosts.id = sandboxes.host_id AND hosts.status = 'online') RETURNING *;

-- name: CountHostLoses :many
-- What would be lost with a host.
SELECT state, count(*) AS n FROM sandboxes WHERE host_id = $1 AND state NOT IN ('stopped', 'error') GROUP BY state;

-- name: CountHostOnlyTemplates :one
-- Teams' templates that no other host has.
SELECT count(*) FROM host_templates JOIN templates ON templates.id = template_id
WHERE host_templates.host_id = $1 AND team_id <> '00000000-0000-0000-0000-000000000000'
  AND NOT EXISTS (SELECT 1 FROM host_templates o WHERE o.template_id = host_templates.template_id AND o.host_id <> host_templates.host_id);

-- name: LoseHostSandboxes :many
UPDATE sandboxes SET state = 'stopped', end_reason = 'lost', error = 'its host was removed', ended_at = now()
WHERE host_id = $1 AND state NOT IN ('stopped', 'error') RETURNING id;

-- name: DropTemplatesOfHost :exec
-- And teams' templates that are nowhere then: their names are free.
WITH dropped AS (DELETE FROM host_templates WHERE host_id = $1 RETURNING template_id),
forgotten AS (DELETE FROM lost_templates WHERE host_id = $1)
DELETE FROM templates WHERE id IN (SELECT template_id FROM dropped) AND team_id <> '00000000-0000-0000-0000-000000000000'
    AND NOT EXISTS (SELECT 1 FROM host_templates o WHERE o.template_id = templates.id AND o.host_id <> $1);

-- name: LockHost :one
SELECT id FROM hosts WHERE id = $1 FOR NO KEY UPDATE;

-- name: CountOnlineHosts :one
SELECT count(*) FROM hosts WHERE status = 'online' AND deleted_at IS NULL;

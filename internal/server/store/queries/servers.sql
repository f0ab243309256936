-- name: ServerAlive :exec
INSERT INTO servers (id, seen_at) VALUES ($1, now()) ON CONFLICT (id) DO UPDATE SET seen_at = now();

-- name: ServerLeaves :exec
DELETE FROM servers WHERE id = $1;

-- name: ReleaseHosts :exec
-- The server stops, so others may take over its hosts at once.
UPDATE hosts SET watcher = NULL WHERE hosts.id = ANY (ARRAY(
    SELECT h.id FROM hosts h WHERE h.watcher = @server::uuid ORDER BY h.id FOR NO KEY UPDATE));

-- name: ForgetServers :exec
DELETE FROM servers WHERE servers.id = ANY (ARRAY(
    SELECT s.id FROM servers s WHERE s.seen_at < now() - interval '1 day' ORDER BY s.id FOR UPDATE));

-- name: ClaimHosts :exec
-- Claims hosts without a watcher or with a dead one. Times in the future are from before
-- the clock was set back and are ignored.
UPDATE hosts SET watcher = @server
WHERE hosts.id = ANY (ARRAY(
    SELECT h.id FROM hosts h WHERE h.deleted_at IS NULL AND h.url IS NOT NULL AND h.watcher IS DISTINCT FROM @server
      AND NOT EXISTS (SELECT 1 FROM servers WHERE servers.id = h.watcher AND servers.seen_at BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8))
    ORDER BY h.id FOR NO KEY UPDATE));

-- name: ListAtWork :many
-- A host's sandboxes that another live server works on.
SELECT sandboxes.id FROM sandboxes JOIN servers ON servers.id = sandboxes.worker
WHERE sandboxes.host_id = @host_id AND sandbox_is_live(sandboxes.state)
  AND servers.id <> @server AND servers.seen_at BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8);

-- name: TakeLease :execrows
INSERT INTO leases (name, server, until) VALUES (@name, @server, now() + make_interval(secs => @secs::float8))
ON CONFLICT (name) DO UPDATE SET server = EXCLUDED.server, until = EXCLUDED.until
WHERE leases.server = EXCLUDED.server OR leases.until NOT BETWEEN now() AND now() + make_interval(secs => 2 * @secs::float8);

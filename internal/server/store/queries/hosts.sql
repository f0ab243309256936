-- name: UpsertHost :one
INSERT INTO hosts (id, url, status) VALUES ($1, $2, 'pending')
ON CONFLICT (url) DO UPDATE SET url = EXCLUDED.url
RETURNING *;

-- name: HostSeen :exec
UPDATE hosts SET status = CASE status WHEN 'draining' THEN 'draining' ELSE 'online' END,
    version = $2, vmm = $3, accelerator = $4, cpus = $5, memory_bytes = $6, disk_bytes = $7, last_seen_at = now()
WHERE id = $1;

-- name: HostUnreachable :exec
UPDATE hosts SET status = 'unreachable' WHERE id = $1 AND status <> 'draining';

-- name: GetSettings :one
SELECT * FROM platform_settings;

-- name: SetSettings :one
UPDATE platform_settings SET signup_open = $1, max_running = $2, max_vcpus = $3, max_memory_mib = $4, max_disk_mib = $5, max_stored_mib = $6 RETURNING *;

-- name: GetQuota :one
SELECT * FROM team_quotas WHERE team_id = $1;

-- name: GetUsage :one
-- Stored size includes records.
SELECT running, vcpus, memory_mib, disk_mib, (stored_mib + records_mib(record_bytes + unsettled_bytes(team_id)))::bigint AS stored_mib FROM team_usage WHERE team_id = $1;

-- name: SetQuota :exec
INSERT INTO team_quotas (team_id, max_running, max_vcpus, max_memory_mib, max_disk_mib, max_stored_mib) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (team_id) DO UPDATE SET max_running = EXCLUDED.max_running, max_vcpus = EXCLUDED.max_vcpus,
    max_memory_mib = EXCLUDED.max_memory_mib, max_disk_mib = EXCLUDED.max_disk_mib, max_stored_mib = EXCLUDED.max_stored_mib;

-- name: DeleteQuota :exec
DELETE FROM team_quotas WHERE team_id = $1;

-- name: AdminListSandboxes :many
SELECT * FROM sandboxes
WHERE (created_at, id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: AdminListTemplates :many
SELECT sqlc.embed(templates), ARRAY(SELECT tag FROM template_tags WHERE template_id = templates.id ORDER BY tag)::text[] AS tags FROM templates
WHERE kind = 'template' AND (id > @after_id::uuid OR @first::boolean)
ORDER BY id
LIMIT @max_rows;

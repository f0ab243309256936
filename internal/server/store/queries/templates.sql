-- name: UpsertTemplate :execrows
-- No row: the team is not there, or the id is another team's.
INSERT INTO templates (id, team_id, name, size_bytes, created_at)
SELECT @id, @team_id, @name, @size_bytes, @created_at WHERE EXISTS (SELECT 1 FROM teams WHERE teams.id = @team_id)
ON CONFLICT (id) DO UPDATE SET name = EXCLUDED.name, size_bytes = EXCLUDED.size_bytes, created_at = EXCLUDED.created_at
    WHERE templates.team_id = EXCLUDED.team_id;

-- name: UpsertHostTemplate :exec
INSERT INTO host_templates (host_id, template_id) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: KeepHostTemplates :exec
DELETE FROM host_templates WHERE host_id = @host_id AND template_id <> ALL (@keep::uuid[]);

-- name: ResolveTemplate :one
-- A team's own template goes before the platform's of the same name.
SELECT * FROM templates
WHERE team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND (id = sqlc.narg('id') OR name = sqlc.narg('name'))
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
ORDER BY team_id = @team_id DESC
LIMIT 1;

-- name: ListTemplates :many
SELECT * FROM templates
WHERE team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
  AND (name, id) > (@after_name::text, @after_id::uuid)
ORDER BY name, id
LIMIT @max_rows;

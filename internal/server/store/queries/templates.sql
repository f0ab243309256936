-- name: AddTemplate :execrows
-- What a host has and the table does not know. No row: its team is not there,
-- or has something else under its name.
INSERT INTO templates (id, team_id, name, size_bytes, created_at, vcpus, memory_mib, disk_mib)
SELECT @id, @team_id, @name, @size_bytes, @created_at, @vcpus, @memory_mib, @disk_mib WHERE EXISTS (SELECT 1 FROM teams WHERE teams.id = @team_id)
ON CONFLICT DO NOTHING;

-- name: ClaimTemplate :one
-- No row: the team has a template of that name.
INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, vcpus, memory_mib, disk_mib, captured_from, worker)
VALUES ($1, $2, $3, 0, $4, 'pending', $5, $6, $7, $8, $9)
ON CONFLICT DO NOTHING
RETURNING *;

-- name: TemplateReady :one
-- The names of teams' templates are the table's, those of the platform's the hosts'.
UPDATE templates SET state = 'ready', size_bytes = @size_bytes, created_at = @created_at, vcpus = @vcpus, memory_mib = @memory_mib, disk_mib = @disk_mib,
    name = CASE WHEN team_id = '00000000-0000-0000-0000-000000000000' THEN @name ELSE name END
WHERE id = @id AND state IN ('pending', 'ready') RETURNING *;

-- name: TemplateDeleting :one
-- Deleting what is being deleted is no change, yet answers with the row.
UPDATE templates SET state = 'deleting', worker = @worker WHERE id = @id AND state IN ('ready', 'deleting') RETURNING *;

-- name: DropTemplate :exec
DELETE FROM templates WHERE id = $1 AND state IN ('pending', 'deleting');

-- name: DropLostTemplates :many
-- A team's template that no host has any more.
DELETE FROM templates WHERE id = ANY (@ids::uuid[]) AND state = 'ready' AND team_id <> '00000000-0000-0000-0000-000000000000'
    AND NOT EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id) RETURNING *;

-- name: AddHostTemplate :exec
INSERT INTO host_templates (host_id, template_id) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: DropHostTemplates :exec
DELETE FROM host_templates WHERE host_id = @host_id AND template_id = ANY (@ids::uuid[]);

-- name: ListHostTemplates :many
-- Those that a host has, is to have, or is to be rid of.
SELECT templates.* FROM templates JOIN host_templates ON template_id = templates.id WHERE host_id = $1;

-- name: ListTemplatesAtWork :many
-- Those that another living server captures or removes.
SELECT templates.id FROM templates JOIN servers ON servers.id = templates.worker
WHERE templates.state <> 'ready' AND servers.id <> @server AND servers.seen_at > now() - make_interval(secs => @within::float8);

-- name: ListTemplateHosts :many
SELECT host_id FROM host_templates WHERE template_id = $1;

-- name: GetTemplate :one
SELECT * FROM templates WHERE id = $1;

-- name: ResolveTemplate :one
-- A team's own template goes before the platform's of the same name.
SELECT * FROM templates
WHERE team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND (id = sqlc.narg('id') OR name = sqlc.narg('name'))
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
ORDER BY team_id = @team_id DESC
LIMIT 1;

-- name: FindTemplate :one
-- Like ResolveTemplate, in any state: the one that is there before those that go.
SELECT * FROM templates
WHERE team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND (id = sqlc.narg('id') OR name = sqlc.narg('name'))
ORDER BY team_id = @team_id DESC, state = 'deleting'
LIMIT 1;

-- name: ListTemplates :many
SELECT * FROM templates
WHERE team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
  AND (name, id) > (@after_name::text, @after_id::uuid)
ORDER BY name, id
LIMIT @max_rows;

-- name: ListSnapshots :many
SELECT * FROM templates
WHERE team_id = @team_id
  AND captured_from IS NOT NULL
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
  AND (name, id) > (@after_name::text, @after_id::uuid)
ORDER BY name, id
LIMIT @max_rows;

-- name: FindLostTemplate :one
-- Restores a template that a host had lost. False: it had not lost it.
SELECT template_found(@host_id, @template_id)::boolean AS found;

-- name: KeepLostTemplate :exec
-- Records what a host has lost, so that it may have it again.
INSERT INTO lost_templates (host_id, template_id, team_id, kept)
SELECT host_templates.host_id, templates.id, templates.team_id, to_jsonb(templates) FROM templates JOIN host_templates ON template_id = templates.id
WHERE templates.id = @id AND host_templates.host_id = @host_id AND templates.id <> '00000000-0000-0000-0000-000000000000'
ON CONFLICT (host_id, template_id) DO UPDATE SET kept = EXCLUDED.kept, lost_at = now();

-- name: ClaimTemplate :one
-- Claims a name for a template captured from a sandbox. No row: the team already has a
-- template of that name.
INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, vcpus, memory_mib, disk_mib, captured_from, worker)
SELECT @id, @team_id, @name::text, 0, @created_at, 'pending', @vcpus, @memory_mib, @disk_mib, @captured_from, @worker
WHERE NOT EXISTS (SELECT 1 FROM templates AS other WHERE other.team_id = @team_id AND other.name = @name::text AND other.kind = 'template' AND other.state <> 'deleting')
ON CONFLICT DO NOTHING
RETURNING *;

-- name: ClaimImport :one
-- Inserts an import: the next version of a name, or a layer for a build. No row: a
-- concurrent request has claimed that version.
INSERT INTO templates (id, team_id, name, kind, version, size_bytes, created_at, state, vcpus, memory_mib, disk_mib, worker, build_id, layer_key)
SELECT @id, @team_id, @name::text, @kind::text,
    CASE WHEN @kind::text = 'layer' THEN 0 ELSE (SELECT coalesce(max(other.version), 0) + 1 FROM templates AS other WHERE other.team_id = @team_id AND other.name = @name::text AND other.kind = 'template') END,
    0, @created_at, 'pending', 0, 0, @disk_mib, @worker, sqlc.narg('build_id'), sqlc.narg('layer_key')
ON CONFLICT DO NOTHING
RETURNING *;

-- name: UseImported :one
-- The layer that builds of a team imported from an image.
UPDATE templates SET used_at = now() WHERE templates.id = (
    SELECT made.id FROM templates AS made
    WHERE made.team_id = @team_id AND made.kind = 'layer' AND made.state = 'ready' AND made.layer_key = @layer_key
      AND EXISTS (SELECT 1 FROM host_templates JOIN hosts ON hosts.id = host_id WHERE template_id = made.id AND hosts.status = 'online')
    ORDER BY made.created_at DESC
    LIMIT 1)
RETURNING *;

-- name: TemplateReady :one
-- Marks ready a template that its host has finished.
UPDATE templates SET state = 'ready', size_bytes = @size_bytes, created_at = GREATEST(templates.created_at, LEAST(@created_at, now())),
    vcpus = @vcpus, memory_mib = @memory_mib, disk_mib = @disk_mib, limits = @limits
WHERE templates.id = @id AND state IN ('pending', 'ready')
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id AND host_id = @host_id) RETURNING *;

-- name: TemplateMeasured :exec
-- Stores a template's size on a host. For the built-in template, which each host builds,
-- also the size of the disk.
UPDATE templates SET size_bytes = @size_bytes, disk_mib = CASE WHEN templates.id = '00000000-0000-0000-0000-000000000000' THEN @disk_mib::integer ELSE templates.disk_mib END
WHERE templates.id = @id AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id AND host_id = @host_id);

-- name: HostHasTemplate :one
SELECT templates.* FROM templates JOIN host_templates ON template_id = templates.id WHERE templates.id = @id AND host_templates.host_id = @host_id;

-- name: TemplateDeleting :one
-- Idempotent: returns the row also if the template is already being deleted.
WITH unnamed AS (
    DELETE FROM template_tags WHERE template_id = (SELECT going.id FROM templates AS going WHERE going.id = @id AND going.state IN ('ready', 'deleting'))
)
UPDATE templates SET state = 'deleting', worker = @worker WHERE templates.id = @id AND state IN ('ready', 'deleting') RETURNING *;

-- name: DropTemplate :exec
DELETE FROM templates WHERE id = $1 AND state IN ('pending', 'deleting');

-- name: DropLostTemplates :many
-- Deletes teams' templates that no host has any more.
DELETE FROM templates WHERE templates.id = ANY (ARRAY(
    SELECT t.id FROM templates t WHERE t.id = ANY (@ids::uuid[]) AND t.state = 'ready' AND t.team_id <> '00000000-0000-0000-0000-000000000000'
      AND NOT EXISTS (SELECT 1 FROM host_templates WHERE host_templates.template_id = t.id)
    ORDER BY t.id FOR UPDATE OF t)) RETURNING *;

-- name: AddHostTemplate :exec
INSERT INTO host_templates (host_id, template_id) VALUES ($1, $2) ON CONFLICT DO NOTHING;

-- name: LockTemplate :exec
-- Lock a template before the rows of what hosts have, as a deletion does.
SELECT FROM templates WHERE id = $1 FOR UPDATE;

-- name: DropHostTemplates :exec
DELETE FROM host_templates WHERE host_templates.host_id = @host_id AND host_templates.template_id = ANY (ARRAY(
    SELECT has.template_id FROM host_templates has WHERE has.host_id = @host_id AND has.template_id = ANY (@ids::uuid[]) ORDER BY has.template_id FOR UPDATE));

-- name: ListHostTemplates :many
-- The templates that a host has, is creating or must delete, and those that all hosts
-- have deleted but whose row is left.
SELECT templates.* FROM templates JOIN host_templates ON template_id = templates.id WHERE host_templates.host_id = @host_id
UNION ALL
SELECT templates.* FROM templates WHERE templates.state = 'deleting' AND NOT EXISTS (SELECT 1 FROM host_templates AS elsewhere WHERE elsewhere.template_id = templates.id);

-- name: ListTemplatesAtWork :many
-- Templates that another live server captures or deletes.
SELECT templates.id FROM templates JOIN servers ON servers.id = templates.worker
WHERE templates.state <> 'ready' AND servers.id <> @server AND servers.seen_at BETWEEN now() - make_interval(secs => @within::float8) AND now() + make_interval(secs => @within::float8);

-- name: ListTemplateHosts :many
SELECT host_id FROM host_templates WHERE template_id = $1;

-- name: GetTemplate :one
SELECT * FROM templates WHERE id = $1;

-- name: ResolveTemplate :one
-- A team's own template takes precedence over the platform's.
SELECT * FROM templates
WHERE templates.team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND (templates.id = sqlc.narg('id') OR templates.name = sqlc.narg('name') AND (version = sqlc.narg('version')
    OR EXISTS (SELECT 1 FROM template_tags WHERE template_id = templates.id AND template_tags.tag = sqlc.narg('tag'))))
  AND kind = 'template'
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
ORDER BY templates.team_id = @team_id DESC
LIMIT 1;

-- name: FindTemplate :one
-- Like ResolveTemplate, in any state. Prefers templates that are not being deleted.
SELECT * FROM templates
WHERE templates.team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND (templates.id = sqlc.narg('id') OR templates.name = sqlc.narg('name') AND (version = sqlc.narg('version') OR state = 'deleting' AND sqlc.narg('tag') = 'latest'
    OR EXISTS (SELECT 1 FROM template_tags WHERE template_id = templates.id AND template_tags.tag = sqlc.narg('tag'))))
  AND kind = 'template'
ORDER BY templates.team_id = @team_id DESC, state = 'deleting'
LIMIT 1;

-- name: ListVersions :many
-- All versions of a team's name, in any state.
SELECT * FROM templates WHERE team_id = @team_id AND name = @name AND kind = 'template' ORDER BY version;

-- name: ListTemplates :many
SELECT sqlc.embed(templates), ARRAY(SELECT tag FROM template_tags WHERE template_id = templates.id ORDER BY tag)::text[] AS tags FROM templates
WHERE templates.team_id IN (@team_id, '00000000-0000-0000-0000-000000000000')
  AND kind = 'template'
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
  AND (templates.name, templates.id) > (@after_name::text, @after_id::uuid)
ORDER BY templates.name, templates.id
LIMIT @max_rows;

-- name: ListSnapshots :many
SELECT sqlc.embed(templates), ARRAY(SELECT tag FROM template_tags WHERE template_id = templates.id ORDER BY tag)::text[] AS tags FROM templates
WHERE templates.team_id = @team_id
  AND captured_from IS NOT NULL
  AND build_id IS NULL
  AND state = 'ready'
  AND EXISTS (SELECT 1 FROM host_templates WHERE template_id = templates.id)
  AND (templates.name, templates.id) > (@after_name::text, @after_id::uuid)
ORDER BY templates.name, templates.id
LIMIT @max_rows;

-- name: ListTags :many
SELECT tag FROM template_tags WHERE template_id = $1 ORDER BY tag;

-- name: SetTag :execrows
-- No row: the template is being deleted.
INSERT INTO template_tags (team_id, name, tag, template_id)
SELECT team_id, name, @tag, id FROM templates WHERE id = @id AND state <> 'deleting'
ON CONFLICT (team_id, name, tag) DO UPDATE SET template_id = EXCLUDED.template_id;

-- name: HasTag :one
-- Whether a template's name has a tag.
SELECT EXISTS (SELECT FROM templates t JOIN template_tags g ON g.team_id = t.team_id AND g.name = t.name WHERE t.id = @id AND g.tag = @tag);

-- name: CheckRoom :exec
-- Fails if a team, or its owner, has more stored than it may.
SELECT charge_team(@team_id, 0, 0, 0, 0, 0, true);

-- name: RemoveTag :execrows
DELETE FROM template_tags WHERE team_id = @team_id AND name = @name AND tag = @tag;

-- name: ListUnusedVersions :many
-- Built templates without tags and without live sandboxes.
SELECT * FROM templates
WHERE build_id IS NOT NULL AND kind = 'template' AND state = 'ready'
  AND NOT EXISTS (SELECT 1 FROM template_tags WHERE template_id = templates.id)
  AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE template_id = templates.id AND sandbox_is_live(state))
ORDER BY id
LIMIT 100;

-- name: NoteFailedImport :exec
-- Keeps the newest twenty failures of a team and the newest one of each name, unless a
-- later failure was stored since.
WITH older AS (
    DELETE FROM failed_imports USING templates
    WHERE templates.id = @id AND failed_imports.team_id = templates.team_id AND failed_imports.name <> templates.name
      AND (SELECT count(*) FROM failed_imports AS newer WHERE newer.team_id = templates.team_id AND newer.failed_at > failed_imports.failed_at) >= 19
)
INSERT INTO failed_imports (team_id, name, error, failed_at)
SELECT templates.team_id, templates.name, @error, now() FROM templates WHERE templates.id = @id AND templates.state = 'pending' AND templates.kind = 'template'
ON CONFLICT (team_id, name) DO UPDATE SET error = EXCLUDED.error, failed_at = EXCLUDED.failed_at
WHERE failed_imports.failed_at < @since;

-- name: ForgetFailedImport :exec
DELETE FROM failed_imports WHERE team_id = @team_id AND name = @name;

-- name: GetFailedImport :one
SELECT * FROM failed_imports WHERE team_id = @team_id AND name = @name;

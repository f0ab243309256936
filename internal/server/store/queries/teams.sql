-- name: ListUserTeams :many
SELECT sqlc.embed(t), m.role FROM team_members m JOIN teams t ON t.id = m.team_id
WHERE m.user_id = $1 AND t.deleting_at IS NULL
ORDER BY m.created_at, t.id;

-- name: CountUserTeams :one
SELECT count(*) FROM team_members m JOIN teams t ON t.id = m.team_id WHERE m.user_id = $1 AND t.deleting_at IS NULL;

-- name: GetTeam :one
SELECT * FROM teams WHERE id = $1 AND deleting_at IS NULL;

-- name: KeepTeam :one
-- Locks a team against deletion until the transaction ends. Lock order: sandboxes,
-- team_usage, teams (charge_team). revoke_tokens locks sandboxes after this, so the lock
-- must be shared.
SELECT id FROM teams WHERE id = $1 AND deleting_at IS NULL FOR SHARE;

-- name: LockLimit :exec
-- Locks until the transaction ends, so that transactions which count a team's objects and
-- then add one run one after another.
SELECT pg_advisory_xact_lock(hashtextextended(@what::text || ' ' || (sqlc.arg('team_id')::uuid)::text, 0));

-- name: RenameTeam :one
UPDATE teams SET name = $2 WHERE id = $1 AND deleting_at IS NULL RETURNING *;

-- name: ListTeams :many
SELECT * FROM teams
WHERE deleting_at IS NULL AND id <> '00000000-0000-0000-0000-000000000000'
  AND (created_at, id) > (@after_at::timestamptz, @after_id::uuid)
ORDER BY created_at, id
LIMIT @max_rows;

-- name: ListMembers :many
SELECT u.id, u.email, m.role, m.created_at FROM team_members m JOIN users u ON u.id = m.user_id
WHERE m.team_id = $1
ORDER BY m.created_at, u.id;

-- name: GetMember :one
SELECT u.id, u.email, m.role, m.created_at FROM team_members m JOIN users u ON u.id = m.user_id
WHERE m.team_id = $1 AND m.user_id = $2;

-- name: CountOwners :one
SELECT count(*) FROM team_members WHERE team_id = $1 AND role = 'owner';

-- name: SetMemberRole :execrows
UPDATE team_members SET role = $3 WHERE team_id = $1 AND user_id = $2;

-- name: DeleteMember :execrows
DELETE FROM team_members WHERE team_id = $1 AND user_id = $2;

-- name: MarkTeamDeleting :execrows
UPDATE teams SET deleting_at = now() WHERE id = $1 AND deleting_at IS NULL;

-- name: ListDeletingTeams :many
SELECT id FROM teams WHERE deleting_at IS NOT NULL ORDER BY deleting_at;

-- name: ListTeamLiveSandboxes :many
SELECT id FROM sandboxes WHERE team_id = $1 AND sandbox_is_live(state);

-- name: ListTeamTemplates :many
SELECT * FROM templates WHERE team_id = $1 ORDER BY id;

-- name: DeleteTeamSandboxes :exec
DELETE FROM sandboxes WHERE sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.team_id = $1 AND NOT sandbox_is_live(s.state) ORDER BY s.id FOR UPDATE));

-- name: LockDeletingTeam :one
SELECT id FROM teams WHERE id = $1 AND deleting_at IS NOT NULL FOR UPDATE;

-- name: DeleteTeam :execrows
-- No row: it still owns templates, whose files are on hosts.
DELETE FROM teams t WHERE t.id = $1 AND t.deleting_at IS NOT NULL AND NOT EXISTS (SELECT FROM templates p WHERE p.team_id = t.id);

-- name: GetTeamPayer :one
-- Whose quota a team's use counts towards: its owner, or itself if it has none.
SELECT COALESCE(team_owner(@team), @team)::uuid AS payer;

-- name: CountUsers :one
-- 1 if there are users, otherwise 0.
SELECT count(*) FROM (SELECT 1 FROM users WHERE verified_at IS NOT NULL LIMIT 1) u;

-- name: InsertUser :exec
INSERT INTO users (id, email, password_hash, admin) VALUES ($1, $2, $3, $4);

-- name: InsertTeam :exec
INSERT INTO teams (id, name) VALUES ($1, $2);

-- name: InsertTeamMember :exec
INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, $3);

-- name: InsertAPIKey :exec
INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash, scopes, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8);

-- name: CountAPIKeys :one
SELECT count(*) FROM api_keys WHERE team_id = $1;

-- name: GetAPIKeyByHash :one
-- No row if the key's creator is inactive or its team is being deleted.
SELECT sqlc.embed(k), COALESCE(u.admin, false)::boolean AS admin, COALESCE(u.epoch, 0)::integer AS epoch, COALESCE(team_owner(k.team_id), k.team_id)::uuid AS payer FROM api_keys k JOIN teams t ON t.id = k.team_id LEFT JOIN users u ON u.id = k.user_id
WHERE k.hash = $1 AND (k.expires_at IS NULL OR k.expires_at > now()) AND t.deleting_at IS NULL AND COALESCE(u.active, true);

-- name: ListAPIKeys :many
SELECT sqlc.embed(k), u.email FROM api_keys k LEFT JOIN users u ON u.id = k.user_id
WHERE k.team_id = @team_id AND (k.created_at, k.id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY k.created_at DESC, k.id DESC
LIMIT @max_rows;

-- name: GetAPIKey :one
SELECT * FROM api_keys WHERE id = $1 AND team_id = $2;

-- name: DeleteAPIKey :execrows
DELETE FROM api_keys WHERE id = $1 AND team_id = $2;

-- name: DeleteMakersAPIKeys :execrows
DELETE FROM api_keys WHERE api_keys.id = ANY (ARRAY(
    SELECT k.id FROM api_keys k WHERE k.team_id = $1 AND k.user_id = $2 ORDER BY k.id FOR UPDATE));

-- name: GetCaller :one
-- The user of a session and their team: the given one, or else the one they joined first.
SELECT u.id, u.email, u.admin, u.epoch, COALESCE(m.created_at, 'epoch')::timestamptz AS joined_at, COALESCE(m.team_id, '00000000-0000-0000-0000-000000000000')::uuid AS team_id, COALESCE(m.role, '')::text AS role,
    COALESCE(team_owner(m.team_id), m.team_id, '00000000-0000-0000-0000-000000000000')::uuid AS payer
FROM sessions s
JOIN users u ON u.id = s.user_id
LEFT JOIN LATERAL (
    SELECT tm.team_id, tm.role, tm.created_at FROM team_members tm JOIN teams t ON t.id = tm.team_id
    WHERE tm.user_id = u.id AND t.deleting_at IS NULL AND (sqlc.narg('team')::uuid IS NULL OR tm.team_id = sqlc.narg('team'))
    ORDER BY tm.created_at, tm.team_id LIMIT 1
) m ON true
WHERE s.id = @session AND s.user_id = @user_id AND s.expires_at > now() AND u.active;

-- name: TouchAPIKeys :exec
UPDATE api_keys SET last_used_at = GREATEST(last_used_at, used.at)
FROM (SELECT unnest(@ids::uuid[]) AS id, unnest(@ats::timestamptz[]) AS at) AS used
WHERE api_keys.id = used.id AND api_keys.id = ANY (ARRAY(SELECT k.id FROM api_keys k WHERE k.id = ANY (@ids::uuid[]) ORDER BY k.id FOR NO KEY UPDATE));

-- name: LockBootstrap :exec
-- Locks until the transaction ends, so that only one of several servers creates the first
-- admin.
SELECT pg_advisory_xact_lock(7746925301);

-- name: CountUsers :one
SELECT count(*) FROM users;

-- name: InsertUser :exec
INSERT INTO users (id, email, password_hash, admin) VALUES ($1, $2, $3, $4);

-- name: InsertTeam :exec
INSERT INTO teams (id, name) VALUES ($1, $2);

-- name: InsertTeamMember :exec
INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, $3);

-- name: InsertAPIKey :exec
INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash) VALUES ($1, $2, $3, $4, $5, $6);

-- name: GetAPIKeyByHash :one
SELECT * FROM api_keys WHERE hash = $1;

-- name: TouchAPIKeys :exec
UPDATE api_keys SET last_used_at = GREATEST(last_used_at, used.at)
FROM (SELECT unnest(@ids::uuid[]) AS id, unnest(@ats::timestamptz[]) AS at) AS used
WHERE api_keys.id = used.id;

-- name: IsAdminsKey :one
SELECT EXISTS (SELECT 1 FROM api_keys JOIN users ON users.id = api_keys.user_id WHERE api_keys.id = $1 AND users.admin);

-- name: LockBootstrap :exec
-- Held to the end of the transaction: of several servers one makes the first admin.
SELECT pg_advisory_xact_lock(7746925301);

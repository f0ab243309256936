-- name: GetUser :one
SELECT * FROM users WHERE id = $1;

-- name: GetUserByEmail :one
SELECT * FROM users WHERE lower(email) = lower(@email);

-- name: LockUser :one
SELECT * FROM users WHERE id = $1 FOR UPDATE;

-- name: FindUsers :many
-- The pattern is a prefix in small letters, escaped, with % at its end.
SELECT * FROM users WHERE lower(email) LIKE @pattern::text AND active ORDER BY lower(email) LIMIT @max_rows;

-- name: ListUsers :many
SELECT * FROM users WHERE lower(email) LIKE @pattern::text AND lower(email) > @after::text ORDER BY lower(email) LIMIT @max_rows;

-- name: SetUserPassword :exec
UPDATE users SET password_hash = $2 WHERE id = $1;

-- name: UpdateUser :one
UPDATE users SET active = COALESCE(sqlc.narg('active'), active), admin = COALESCE(sqlc.narg('admin'), admin) WHERE id = @id RETURNING *;

-- name: CountAdmins :one
SELECT count(*) FROM users WHERE admin AND active;

-- name: GetIdentityUser :one
SELECT u.* FROM identities i JOIN users u ON u.id = i.user_id WHERE i.provider = $1 AND i.subject = $2;

-- name: InsertIdentity :execrows
INSERT INTO identities (provider, subject, user_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING;

-- name: ListIdentities :many
SELECT provider FROM identities WHERE user_id = $1 ORDER BY provider;

-- name: InsertSession :exec
INSERT INTO sessions (id, user_id, refresh_hash, expires_at, user_agent, address) VALUES ($1, $2, $3, $4, $5, $6);

-- name: LockSession :one
SELECT s.*, u.active FROM sessions s JOIN users u ON u.id = s.user_id WHERE s.id = $1 FOR UPDATE OF s;

-- name: RotateSession :exec
UPDATE sessions SET previous_hash = refresh_hash, refresh_hash = @refresh_hash, rotated_at = @rotated_at, expires_at = @expires_at WHERE id = @id;

-- name: DeleteSession :exec
DELETE FROM sessions WHERE id = $1;

-- name: DeleteUserSessions :exec
-- All of a user's, but for one.
DELETE FROM sessions WHERE user_id = @user_id AND id <> @keep;

-- name: DeleteOldSessions :exec
DELETE FROM sessions WHERE expires_at < now();

-- name: InsertPasswordReset :exec
INSERT INTO password_resets (hash, user_id, expires_at) VALUES ($1, $2, $3);

-- name: TakePasswordReset :one
DELETE FROM password_resets WHERE hash = $1 AND expires_at > now() RETURNING user_id;

-- name: DeletePasswordResets :exec
DELETE FROM password_resets WHERE user_id = $1;

-- name: DeleteOldPasswordResets :exec
DELETE FROM password_resets WHERE expires_at < now();

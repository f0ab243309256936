-- name: GetUser :one
SELECT * FROM users WHERE id = $1;

-- name: GetUserByEmail :one
SELECT * FROM users WHERE lower(email) = lower(@email);

-- name: LockUser :one
SELECT * FROM users WHERE id = $1 FOR UPDATE;

-- name: FindUser :many
-- Finds the user with an address, for a caller who may add members to a team.
SELECT * FROM users WHERE lower(email) = lower(@email) AND active AND verified_at IS NOT NULL
  AND EXISTS (SELECT 1 FROM team_members WHERE user_id = @asked_by AND role IN ('owner', 'admin'));

-- name: ListUsers :many
SELECT * FROM users WHERE lower(email) LIKE @pattern::text AND lower(email) > @after::text ORDER BY lower(email) LIMIT @max_rows;

-- name: SetUserPassword :exec
UPDATE users SET password_hash = $2 WHERE id = $1;

-- name: VerifyUser :execrows
UPDATE users SET verified_at = now() WHERE id = $1 AND verified_at IS NULL;

-- name: SignUpAgain :exec
-- An account with an unverified address belongs to the last one who signed up.
UPDATE users SET password_hash = @password_hash, admin = admin OR @admin::boolean, created_at = now() WHERE id = @id AND verified_at IS NULL;

-- name: UpdateUser :one
UPDATE users SET active = COALESCE(sqlc.narg('active'), active), admin = COALESCE(sqlc.narg('admin'), admin) WHERE id = @id RETURNING *;

-- name: CountAdmins :one
SELECT count(*) FROM users WHERE admin AND active AND verified_at IS NOT NULL;

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
-- Deletes all of a user's sessions except one.
DELETE FROM sessions WHERE sessions.id = ANY (ARRAY(
    SELECT s.id FROM sessions s WHERE s.user_id = @user_id AND s.id <> @keep ORDER BY s.id FOR UPDATE));

-- name: DeleteExcessSessions :exec
-- Deletes the oldest sessions of a user. It keeps one, and the newest of the others.
DELETE FROM sessions WHERE sessions.id = ANY (ARRAY(
    SELECT s.id FROM sessions s WHERE s.id IN (SELECT o.id FROM sessions o WHERE o.user_id = @user_id AND o.id <> @keep ORDER BY o.created_at DESC, o.id DESC OFFSET @most::integer)
    ORDER BY s.id FOR UPDATE));

-- name: DeleteOldSessions :exec
DELETE FROM sessions WHERE sessions.id = ANY (ARRAY(
    SELECT s.id FROM sessions s WHERE s.expires_at < now() ORDER BY s.id FOR UPDATE));

-- name: InsertMailToken :exec
INSERT INTO mail_tokens (hash, user_id, purpose, expires_at) VALUES ($1, $2, $3, $4);

-- name: GetMailToken :one
SELECT user_id FROM mail_tokens WHERE hash = $1 AND purpose = $2 AND expires_at > now();

-- name: TakeMailToken :one
DELETE FROM mail_tokens WHERE hash = $1 AND purpose = $2 AND expires_at > now() RETURNING user_id;

-- name: DeleteMailTokens :exec
DELETE FROM mail_tokens WHERE mail_tokens.hash = ANY (ARRAY(
    SELECT m.hash FROM mail_tokens m WHERE m.user_id = $1 ORDER BY m.hash FOR UPDATE));

-- name: DeleteVerifyTokens :exec
DELETE FROM mail_tokens WHERE mail_tokens.hash = ANY (ARRAY(
    SELECT m.hash FROM mail_tokens m WHERE m.user_id = $1 AND m.purpose = 'verify' ORDER BY m.hash FOR UPDATE));

-- name: DeleteOldMailTokens :exec
DELETE FROM mail_tokens WHERE mail_tokens.hash = ANY (ARRAY(
    SELECT m.hash FROM mail_tokens m WHERE m.expires_at < now() ORDER BY m.hash FOR UPDATE));

-- name: DeleteUnverifiedUsers :exec
-- After a week without verification, the address is free for a new sign-up.
DELETE FROM users WHERE users.id = ANY (ARRAY(
    SELECT u.id FROM users u WHERE u.verified_at IS NULL AND u.created_at < now() - interval '7 days' ORDER BY u.id FOR UPDATE));

-- name: GetInstallationSecret :one
SELECT * FROM installation_secret;

-- name: SetInstallationSecret :exec
INSERT INTO installation_secret (key_id, sealed) VALUES ($1, $2)
ON CONFLICT (id) DO UPDATE SET key_id = EXCLUDED.key_id, sealed = EXCLUDED.sealed;

-- name: InsertAudit :exec
-- What falls into the bucket of a record that is there is counted in that one.
INSERT INTO audit_records (id, at, team_id, actor, actor_id, user_id, action, object, object_id, address, request_id, result, code, bucket)
VALUES ($1, now(), $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
ON CONFLICT (bucket) WHERE bucket IS NOT NULL DO UPDATE SET count = audit_records.count + 1;

-- name: ListTeamAudit :many
SELECT * FROM audit_records
WHERE team_id = @team_id::uuid AND (at, id) < (@before_at::timestamptz, @before_id::uuid) AND at >= @from_at::timestamptz
  AND (@actor_kind::text = '' OR actor = @actor_kind) AND (sqlc.narg('actor')::uuid IS NULL OR actor_id = sqlc.narg('actor') OR user_id = sqlc.narg('actor'))
  AND (@action::text = '' OR action = @action) AND (@object_id::text = '' OR object_id = @object_id) AND (@result::text = '' OR result = @result)
ORDER BY at DESC, id DESC LIMIT @max_rows;

-- name: ListAudit :many
SELECT * FROM audit_records
WHERE (at, id) < (@before_at::timestamptz, @before_id::uuid) AND at >= @from_at::timestamptz
  AND (@actor_kind::text = '' OR actor = @actor_kind) AND (sqlc.narg('actor')::uuid IS NULL OR actor_id = sqlc.narg('actor') OR user_id = sqlc.narg('actor'))
  AND (@action::text = '' OR action = @action) AND (@object_id::text = '' OR object_id = @object_id) AND (@result::text = '' OR result = @result)
ORDER BY at DESC, id DESC LIMIT @max_rows;

-- name: ForgetAudit :execrows
DELETE FROM audit_records WHERE id = ANY (ARRAY(SELECT a.id FROM audit_records a WHERE a.at < @before ORDER BY a.at, a.id LIMIT @max_rows FOR UPDATE));

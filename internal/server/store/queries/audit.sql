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

-- name: ForgetTeamAudit :execrows
DELETE FROM audit_records WHERE id = ANY (ARRAY(
    SELECT a.id FROM audit_records a WHERE a.team_id = @team_id::uuid ORDER BY a.at, a.id LIMIT @max_rows FOR UPDATE));

-- name: CountRecords :many
-- Of each team: its audit records, the bytes of the records that come with changes, and
-- how many of these bytes it was charged for.
SELECT t.id AS team_id, COALESCE(a.n, 0)::bigint AS audit,
    (512 * COALESCE(a.n, 0) + 256 * COALESCE(r.n, 0) + 256 * COALESCE(g.n, 0))::bigint AS bytes, COALESCE(u.swept_bytes, 0)::bigint AS charged
FROM teams t
LEFT JOIN (SELECT team_id, count(*) AS n FROM audit_records GROUP BY team_id) a ON a.team_id = t.id
LEFT JOIN (SELECT team_id, count(*) AS n FROM sandbox_runs GROUP BY team_id) r ON r.team_id = t.id
LEFT JOIN (SELECT team_id, count(*) AS n FROM template_tags GROUP BY team_id) g ON g.team_id = t.id
LEFT JOIN team_usage u ON u.team_id = t.id
ORDER BY t.id;

-- name: ChargeRecords :exec
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib, record_bytes, swept_bytes)
SELECT id, 0, 0, 0, 0, @bytes::bigint, @bytes::bigint FROM teams WHERE id = @team_id
ON CONFLICT (team_id) DO UPDATE SET record_bytes = u.record_bytes - u.swept_bytes + EXCLUDED.swept_bytes, swept_bytes = EXCLUDED.swept_bytes;

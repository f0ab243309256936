-- name: InsertAudit :exec
-- Counts the request in an existing record with the same bucket.
INSERT INTO audit_records (id, at, team_id, actor, actor_id, user_id, action, object, object_id, address, request_id, result, code, bucket)
VALUES ($1, now(), $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
ON CONFLICT (bucket) WHERE bucket IS NOT NULL DO UPDATE SET count = audit_records.count + 1;

-- name: DeleteAudit :exec
DELETE FROM audit_records WHERE id = $1;

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

-- name: CountUsersAudit :many
-- Of each user with more than most: the audit records that no team is charged for, because
-- they are about the user's account or their team is deleted. Admins have no limit.
SELECT COALESCE(a.user_id, a.actor_id)::uuid AS of_user, count(*) AS audit FROM audit_records a
WHERE a.actor IN ('user', 'key') AND NOT EXISTS (SELECT FROM teams WHERE teams.id = a.team_id)
  AND NOT EXISTS (SELECT FROM users WHERE users.id = COALESCE(a.user_id, a.actor_id) AND users.admin)
GROUP BY 1 HAVING count(*) > @most::bigint;

-- name: ForgetUserAudit :execrows
DELETE FROM audit_records WHERE id = ANY (ARRAY(
    SELECT a.id FROM audit_records a
    WHERE a.actor IN ('user', 'key') AND COALESCE(a.user_id, a.actor_id) = @of_user::uuid AND NOT EXISTS (SELECT FROM teams WHERE teams.id = a.team_id)
    ORDER BY a.at, a.id LIMIT @max_rows FOR UPDATE));

-- name: CountRecords :many
-- Of each team: its audit records, the bytes of the records that come with changes, and
-- how many of these bytes the last RecountRecords counted.
SELECT t.id AS team_id, COALESCE(a.n, 0)::bigint AS audit,
    (record_size('audit_records') * COALESCE(a.n, 0) + record_size('sandbox_runs') * COALESCE(r.n, 0) + record_size('template_tags') * COALESCE(g.n, 0) + COALESCE(d.bytes, 0))::bigint AS bytes,
    COALESCE(u.swept_bytes, 0)::bigint AS counted
FROM teams t
LEFT JOIN (SELECT team_id, count(*) AS n FROM audit_records GROUP BY team_id) a ON a.team_id = t.id
LEFT JOIN (SELECT team_id, count(*) AS n FROM sandbox_runs GROUP BY team_id) r ON r.team_id = t.id
LEFT JOIN (SELECT team_id, count(*) AS n FROM template_tags GROUP BY team_id) g ON g.team_id = t.id
LEFT JOIN (SELECT team_id, sum(bytes) AS bytes FROM deliveries GROUP BY team_id) d ON d.team_id = t.id
LEFT JOIN team_usage u ON u.team_id = t.id
ORDER BY t.id;

-- name: LockTeamUsage :exec
-- Locks a row to the end of the transaction. RecountRecords needs it.
INSERT INTO team_usage AS u (team_id, running, vcpus, memory_mib, disk_mib)
SELECT id, 0, 0, 0, 0 FROM teams WHERE id = @team_id
ON CONFLICT (team_id) DO UPDATE SET running = u.running;

-- name: RecountRecords :exec
-- Counts a team's records again, and drops the charges. One statement sees each record together with its charge,
-- or neither of them. Call LockTeamUsage first.
WITH dropped AS (
    DELETE FROM record_charges WHERE record_charges.id = ANY (ARRAY(
        SELECT c.id FROM record_charges c WHERE c.team_id = @team_id ORDER BY c.id FOR UPDATE))
)
UPDATE team_usage SET record_bytes = record_bytes - swept_bytes + counted.bytes, swept_bytes = counted.bytes
FROM (SELECT record_size('audit_records') * (SELECT count(*) FROM audit_records a WHERE a.team_id = @team_id)
    + record_size('sandbox_runs') * (SELECT count(*) FROM sandbox_runs r WHERE r.team_id = @team_id)
    + record_size('template_tags') * (SELECT count(*) FROM template_tags g WHERE g.team_id = @team_id)
    + (SELECT COALESCE(sum(d.bytes), 0) FROM channels c JOIN deliveries d ON d.channel_id = c.id WHERE c.team_id = @team_id) AS bytes) AS counted
WHERE team_usage.team_id = @team_id;

-- name: ForgetCharges :exec
-- Deletes the charges of teams that no longer exist.
DELETE FROM record_charges WHERE record_charges.id = ANY (ARRAY(
    SELECT c.id FROM record_charges c WHERE NOT EXISTS (SELECT FROM teams WHERE teams.id = c.team_id) ORDER BY c.id FOR UPDATE));

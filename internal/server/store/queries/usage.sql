-- The run of a missing sandbox counts until its host was last seen.

-- name: LockUsage :exec
-- Locks until the transaction ends.
SELECT pg_advisory_xact_lock(hashtext('wrenn.usage'));

-- name: FirstRunDay :one
SELECT COALESCE(min(started_at), now())::timestamptz AS first FROM sandbox_runs;

-- name: ListRolledDays :many
SELECT day FROM usage_rollups WHERE day BETWEEN @from_day::date AND @to_day::date ORDER BY day;

-- name: ForgetUsageDay :exec
DELETE FROM usage_days WHERE day = @day::date;

-- name: RollUsageDay :exec
INSERT INTO usage_days (team_id, day, vcpu_seconds, memory_mib_seconds, starts)
SELECT r.team_id, d.day,
    sum(r.vcpus * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at))),
    sum(r.memory_mib * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at))),
    count(*) FILTER (WHERE r.first AND r.started_at >= utc_day(d.day))
FROM (SELECT @day::date AS day) d
JOIN sandbox_runs r ON r.started_at < utc_day(d.day + 1) AND (r.ended_at IS NULL OR r.ended_at >= utc_day(d.day))
GROUP BY r.team_id, d.day;

-- name: MarkUsageDay :exec
INSERT INTO usage_rollups (day) VALUES (@day::date) ON CONFLICT DO NOTHING;

-- name: ForgetRuns :execrows
-- In small batches. The runs' days are summed up and no longer change.
DELETE FROM sandbox_runs WHERE id = ANY (ARRAY(
    SELECT r.id FROM sandbox_runs r WHERE r.ended_at < @before ORDER BY r.ended_at, r.id LIMIT @max_rows FOR UPDATE));

-- name: ListUsageDays :many
SELECT day, vcpu_seconds::float8 AS vcpu_seconds, memory_mib_seconds::float8 AS memory_mib_seconds, starts
FROM usage_days WHERE team_id = @team_id AND day = ANY (@days::date[]) ORDER BY day;

-- name: ListLiveUsage :many
-- Days that are not summed up yet.
SELECT d.day::date AS day,
    sum(r.vcpus * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at)))::float8 AS vcpu_seconds,
    sum(r.memory_mib * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at)))::float8 AS memory_mib_seconds,
    count(*) FILTER (WHERE r.first AND r.started_at >= utc_day(d.day)) AS starts
FROM (SELECT unnest(@days::date[]) AS day) d
JOIN sandbox_runs r ON r.team_id = @team_id AND r.started_at < utc_day(d.day + 1) AND (r.ended_at IS NULL OR r.ended_at >= utc_day(d.day))
GROUP BY d.day ORDER BY d.day;

-- name: ListUsageByTeam :many
-- Includes teams without use that store something.
SELECT parts.team_id, COALESCE((SELECT teams.name FROM teams WHERE teams.id = parts.team_id), '')::text AS name,
    sum(parts.vcpu_seconds)::float8 AS vcpu_seconds, sum(parts.memory_mib_seconds)::float8 AS memory_mib_seconds, sum(parts.starts)::bigint AS starts,
    COALESCE((SELECT t.stored_mib + records_mib(t.record_bytes + unsettled_bytes(t.team_id)) FROM team_usage t WHERE t.team_id = parts.team_id), 0)::bigint AS stored_mib
FROM (
    SELECT t.team_id, 0 AS vcpu_seconds, 0 AS memory_mib_seconds, 0 AS starts FROM team_usage t WHERE t.stored_mib + records_mib(t.record_bytes + unsettled_bytes(t.team_id)) > 0
    UNION ALL
    SELECT u.team_id, u.vcpu_seconds, u.memory_mib_seconds, u.starts FROM usage_days u WHERE u.day = ANY (@rolled::date[])
    UNION ALL
    SELECT r.team_id,
        r.vcpus * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at)),
        r.memory_mib * seconds_of_day(d.day, r.started_at, COALESCE(r.ended_at, r.missing_at)),
        CASE WHEN r.first AND r.started_at >= utc_day(d.day) THEN 1 ELSE 0 END
    FROM (SELECT unnest(@live::date[]) AS day) d
    JOIN sandbox_runs r ON r.started_at < utc_day(d.day + 1) AND (r.ended_at IS NULL OR r.ended_at >= utc_day(d.day))
) parts
WHERE parts.team_id > @after_team::uuid
GROUP BY parts.team_id ORDER BY parts.team_id LIMIT @max_rows;

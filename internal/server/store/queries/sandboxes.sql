-- Every change of state names the allowed previous states, so that of two concurrent
-- changes one wins and the other gets no row. A change that a host reports or executes
-- also names the host, so that no other host can make it.
--
-- Statements that change several rows lock them first, all at once and sorted by key, so
-- that no two wait for each other (TestLockOrder). An array of the keys, computed before
-- any change, keeps that order.

-- name: InsertSandbox :one
INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, on_timeout, auto_resume, forked_from, build_id)
VALUES ($1, $2, $3, $4, $5, 'starting', $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
RETURNING *;

-- name: ClaimIdempotencyKey :execrows
INSERT INTO idempotency_keys (team_id, key, request_hash, sandbox_id, copies, template_id) VALUES (@team_id, @key, @request_hash, @sandbox_id, COALESCE(@copies::uuid[], '{}'), @template_id)
ON CONFLICT DO NOTHING;

-- name: GetIdempotencyKey :one
SELECT * FROM idempotency_keys WHERE team_id = $1 AND key = $2;

-- name: FreeIdempotencyKeys :exec
DELETE FROM idempotency_keys WHERE idempotency_keys.ctid = ANY (ARRAY(
    SELECT k.ctid FROM idempotency_keys k WHERE k.sandbox_id = $1 ORDER BY k.team_id, k.key FOR UPDATE));

-- name: ForgetIdempotencyKeys :exec
DELETE FROM idempotency_keys WHERE idempotency_keys.ctid = ANY (ARRAY(
    SELECT k.ctid FROM idempotency_keys k WHERE k.created_at < @before ORDER BY k.team_id, k.key FOR UPDATE));

-- name: GetSandbox :one
SELECT * FROM sandboxes WHERE id = $1;

-- name: GetSandboxPayer :one
-- A sandbox with its team's payer, as in GetTeamPayer.
SELECT sqlc.embed(sandboxes), COALESCE(team_owner(team_id), team_id)::uuid AS payer FROM sandboxes WHERE id = $1;

-- name: GetTeamSandbox :one
-- Excludes sandboxes of builds, which only their build may use.
SELECT * FROM sandboxes WHERE id = $1 AND team_id = $2 AND build_id IS NULL;

-- name: ListLiveSandboxes :many
-- Uses a partial index.
SELECT * FROM sandboxes
WHERE team_id = @team_id
  AND sandbox_is_live(state)
  AND build_id IS NULL
  AND metadata @> @metadata::jsonb
  AND (created_at, id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: ListSandboxes :many
SELECT * FROM sandboxes
WHERE team_id = @team_id
  AND state = ANY (@states::text[])
  AND build_id IS NULL
  AND metadata @> @metadata::jsonb
  AND (created_at, id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: ListHostSandboxes :many
SELECT * FROM sandboxes WHERE host_id = $1 AND sandbox_is_live(state);

-- name: ListHostSandboxIDs :many
SELECT id FROM sandboxes WHERE host_id = $1 AND sandbox_is_live(state);

-- name: CountLiveSandboxes :many
SELECT state, count(*) AS n FROM sandboxes WHERE sandbox_is_live(state) GROUP BY state;

-- name: SandboxRunning :one
UPDATE sandboxes SET state = 'running', started_at = COALESCE(started_at, @started_at), expires_at = @expires_at,
    disk_mib = @disk_mib, start_ms = COALESCE(start_ms, @start_ms)
WHERE id = @id AND host_id = @host_id AND sandbox_is_starting(state) RETURNING *;

-- name: SandboxFailed :one
UPDATE sandboxes SET state = 'error', end_reason = 'failed', error = @error, ended_at = now()
WHERE id = @id AND host_id = @host_id AND sandbox_is_starting(state) RETURNING *;

-- name: DropUnstarted :exec
-- Deletes sandboxes that no host was asked for, or that it refused, with their
-- idempotency keys.
DELETE FROM sandboxes WHERE sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.id = ANY (@ids::uuid[]) AND sandbox_is_starting(s.state) ORDER BY s.id FOR UPDATE));

-- name: SandboxPausing :one
UPDATE sandboxes SET state = 'pausing' WHERE id = $1 AND state = 'running' RETURNING *;

-- name: SandboxDrains :one
-- Marks pausing a sandbox because its host drains, if it still does.
UPDATE sandboxes SET state = 'pausing', drained = true
WHERE sandboxes.id = $1 AND state = 'running' AND EXISTS (SELECT 1 FROM hosts WHERE hosts.id = sandboxes.host_id AND hosts.draining) RETURNING *;

-- name: SandboxStaysPaused :one
-- Records that somebody requested the pause of a drained sandbox.
UPDATE sandboxes SET drained = false, expires_at = NULL WHERE id = $1 AND state = 'paused' RETURNING *;

-- name: DrainedExpire :many
-- Marks stopping a host's drained sandboxes whose timeout has passed. One that has lost
-- its memory ends for that reason.
UPDATE sandboxes SET state = 'stopping', end_reason = CASE
    WHEN condition = 'memory_lost' AND condition_reason IN ('oom', 'crashed', 'restarted', 'killed') THEN condition_reason ELSE 'expired' END
WHERE sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.host_id = $1 AND sandbox_is_live(s.state) AND s.state = 'paused' AND s.drained AND s.expires_at < now()
    ORDER BY s.id FOR NO KEY UPDATE)) RETURNING sandboxes.id;

-- name: SandboxPaused :one
UPDATE sandboxes SET state = 'paused', paused_at = COALESCE(paused_at, @paused_at::timestamptz),
    expires_at = CASE WHEN drained AND on_timeout = 'destroy' THEN expires_at END,
    condition = CASE condition WHEN 'unresponsive' THEN '' ELSE condition END
WHERE id = @id AND host_id = @host_id AND state = ANY (@came_from::text[]) AND state IN ('running', 'missing', 'pausing', 'resuming') RETURNING *;

-- name: SandboxMemoryLost :one
-- Its host has it paused without its memory. Nobody requested that, so the next use
-- resumes it, and its timeout continues if that destroys it.
UPDATE sandboxes SET state = 'paused', paused_at = COALESCE(paused_at, @paused_at::timestamptz), drained = true,
    expires_at = CASE WHEN on_timeout = 'destroy' THEN expires_at END,
    condition = 'memory_lost', condition_reason = @reason, condition_detail = @detail, condition_since = @since::timestamptz
WHERE id = @id AND host_id = @host_id AND state = ANY (@came_from::text[]) AND state IN ('running', 'missing', 'pausing', 'resuming') RETURNING *;

-- name: SandboxesCondition :many
-- Stores what the host reports for running sandboxes. An empty reason clears a condition.
UPDATE sandboxes SET condition = CASE seen.reason WHEN '' THEN '' ELSE 'unresponsive' END,
    condition_reason = seen.reason, condition_detail = seen.detail, condition_since = CASE seen.reason WHEN '' THEN NULL ELSE seen.since END
FROM (SELECT unnest(@ids::uuid[]) AS id, unnest(@reasons::text[]) AS reason, unnest(@details::text[]) AS detail, unnest(@sinces::timestamptz[]) AS since) AS seen
WHERE sandboxes.id = seen.id AND sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.id = ANY (@ids::uuid[]) AND s.host_id = @host_id AND s.state = 'running' ORDER BY s.id FOR NO KEY UPDATE)) RETURNING sandboxes.id;

-- name: SandboxResuming :one
UPDATE sandboxes SET state = 'resuming' WHERE id = $1 AND state = 'paused' RETURNING *;

-- name: SandboxRebooting :one
UPDATE sandboxes SET state = 'resuming' WHERE id = $1 AND state IN ('running', 'paused') RETURNING *;

-- name: SandboxGoesOn :one
-- It was resumed or rebooted, or its pause failed.
UPDATE sandboxes SET state = 'running', drained = false, paused_at = NULL, expires_at = @expires_at,
    condition = '', condition_reason = '', condition_detail = '', condition_since = NULL
WHERE id = @id AND host_id = @host_id AND sandbox_has_image(state) RETURNING *;

-- name: SandboxStopping :one
-- Idempotent: returns the row also if the sandbox is already stopping.
UPDATE sandboxes SET state = 'stopping', ended_by = COALESCE(NULLIF(ended_by, ''), @ended_by)
WHERE id = @id AND sandbox_is_live(state) RETURNING *;

-- name: SandboxStopped :one
UPDATE sandboxes SET state = 'stopped', end_reason = COALESCE(end_reason, 'deleted'), ended_at = now()
WHERE id = $1 AND state = 'stopping' RETURNING *;

-- name: SandboxEnded :one
-- It ended without a request.
UPDATE sandboxes SET state = 'stopped', end_reason = @end_reason::text, error = @error,
    ended_at = GREATEST(started_at, created_at, LEAST(@ended_at::timestamptz, now()))
WHERE id = @id AND host_id = @host_id AND sandbox_is_live(state) AND NOT sandbox_is_starting(state) AND state <> 'stopping' RETURNING *;

-- name: SandboxRevived :one
-- Its host had ended or lost it and now has it paused. Revocations leave out sandboxes that
-- have ended, so its old tokens end here.
UPDATE sandboxes SET state = 'paused', paused_at = @paused_at::timestamptz, drained = false, expires_at = NULL, end_reason = NULL, error = '', ended_at = NULL,
    token_epoch = token_epoch + 1
WHERE id = @id AND host_id = @host_id AND state = 'stopped' AND end_reason IN ('exited', 'lost') RETURNING *;

-- name: SandboxExpires :one
UPDATE sandboxes SET expires_at = @expires_at WHERE id = @id AND host_id = @host_id AND state = 'running' RETURNING *;

-- name: RevokeTokens :one
UPDATE sandboxes SET token_epoch = token_epoch + 1 WHERE id = @id AND team_id = @team_id AND build_id IS NULL RETURNING *;

-- name: SandboxesExpire :exec
UPDATE sandboxes SET expires_at = seen.at
FROM (SELECT unnest(@ids::uuid[]) AS id, unnest(@ats::timestamptz[]) AS at) AS seen
WHERE sandboxes.id = seen.id AND sandboxes.expires_at IS DISTINCT FROM seen.at AND sandboxes.id = ANY (ARRAY(
    SELECT s.id FROM sandboxes s WHERE s.id = ANY (@ids::uuid[]) AND s.host_id = @host_id AND s.state = 'running' ORDER BY s.id FOR NO KEY UPDATE));

-- name: LockSandboxes :exec
-- Call this before a transaction changes several sandboxes: rows are locked before their
-- teams' use (see charge_team), and in one order.
SELECT FROM sandboxes WHERE id = ANY (@ids::uuid[]) ORDER BY id FOR UPDATE;

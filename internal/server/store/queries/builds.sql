-- name: InsertBuild :one
-- No row: the team has the maximum number of queued and running builds.
INSERT INTO builds (id, team_id, name, tags, recipe, archive, options, registry, state, total_steps, created_at, trace)
SELECT @id, @team_id, @name, @tags, @recipe, sqlc.narg('archive'), @options, sqlc.narg('registry'), 'queued', @total_steps, @created_at, @trace
WHERE (SELECT count(*) FROM builds AS other WHERE other.team_id = @team_id AND other.state IN ('queued', 'running')) < @most::bigint
RETURNING *;

-- name: GetTeamBuild :one
SELECT * FROM builds WHERE id = $1 AND team_id = $2;

-- name: ListBuilds :many
-- Without the recipes, which can be long.
SELECT id, team_id, name, version, tags, state, error, total_steps, done_steps, attempts, template_id, created_at, started_at, ended_at FROM builds
WHERE team_id = @team_id AND (created_at, id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY created_at DESC, id DESC
LIMIT @max_rows;

-- name: LockBuilds :exec
-- Serializes claims, so that a team's builds are counted correctly.
SELECT pg_advisory_xact_lock(7239150284);

-- name: ClaimBuild :one
-- Claims a build that is queued or whose lease has expired: the oldest one of the owner
-- with the fewest running. Limits on the running builds of one owner, in total and per
-- worker (own), leave places to others. now() is when this transaction began, so a lease
-- that was renewed since then ends later than a new one would. A lease that ends much
-- later is from before the clock was set back.
WITH payers AS MATERIALIZED (
    SELECT t.team_id, COALESCE(team_owner(t.team_id), t.team_id) AS payer FROM (SELECT DISTINCT o.team_id FROM builds o WHERE o.state IN ('queued', 'running')) t
), open AS MATERIALIZED (
    SELECT o.id, o.state, o.worker, o.lease_until, o.created_at, payers.payer FROM builds o JOIN payers USING (team_id) WHERE o.state IN ('queued', 'running')
)
UPDATE builds SET state = 'running', worker = @worker, lease_until = now() + make_interval(secs => @lease::float8),
    attempts = builds.attempts + 1, started_at = COALESCE(builds.started_at, now())
WHERE builds.id = (
    SELECT b.id FROM open AS b
    CROSS JOIN LATERAL (SELECT count(*) AS running, count(*) FILTER (WHERE other.worker = @worker AND other.id <> b.id) AS own
        FROM open AS other WHERE other.payer = b.payer AND other.state = 'running') AS theirs
    WHERE (b.state = 'queued' AND theirs.running < @most::bigint
       OR b.state = 'running' AND b.lease_until NOT BETWEEN now() AND now() + make_interval(secs => 2 * @lease::float8))
      AND theirs.own < @own::bigint
    ORDER BY theirs.running, b.created_at LIMIT 1)
RETURNING *;

-- name: RenewBuild :one
-- No row: another worker has taken over, or the build has ended.
UPDATE builds SET lease_until = now() + make_interval(secs => @lease::float8)
WHERE id = @id AND state = 'running' AND worker = @worker AND attempts = @attempts RETURNING cancelling;

-- name: ReleaseBuild :exec
-- Requeues the build without counting this attempt.
UPDATE builds SET state = 'queued', worker = NULL, lease_until = NULL, attempts = attempts - 1, done_steps = 0
WHERE id = @id AND state = 'running' AND worker = @worker;

-- name: BuildProgress :exec
UPDATE builds SET done_steps = @done_steps WHERE id = @id AND state = 'running' AND worker = @worker;

-- name: BuildEnds :one
UPDATE builds SET state = @state, error = @error, ended_at = now(), worker = NULL, lease_until = NULL, registry = NULL
WHERE id = @id AND state = 'running' AND worker = @worker RETURNING *;

-- name: BuildSucceeds :one
-- No row: it was cancelled, or another worker has taken over.
UPDATE builds SET state = 'succeeded', done_steps = total_steps, template_id = @template_id, version = @version, ended_at = now(), worker = NULL, lease_until = NULL, registry = NULL
WHERE id = @id AND state = 'running' AND worker = @worker AND NOT cancelling RETURNING *;

-- name: CancelBuild :one
-- A queued build ends at once. The worker of a running one ends it.
UPDATE builds SET cancelling = true,
    state = CASE WHEN state = 'queued' THEN 'cancelled' ELSE state END,
    ended_at = CASE WHEN state = 'queued' THEN now() ELSE ended_at END,
    registry = CASE WHEN state = 'queued' THEN NULL ELSE registry END
WHERE id = @id AND team_id = @team_id AND state IN ('queued', 'running') RETURNING *;

-- name: ClearBuildSteps :exec
-- Only the worker that holds the lease calls this.
DELETE FROM build_steps WHERE build_id = $1;

-- name: WriteBuildStep :exec
INSERT INTO build_steps (build_id, number, log) VALUES ($1, $2, $3)
ON CONFLICT (build_id, number) DO UPDATE SET log = EXCLUDED.log;

-- name: ListBuildSteps :many
SELECT * FROM build_steps WHERE build_id = $1 ORDER BY number;

-- name: MeasureBuildLogs :many
-- Measures the logs of finished builds, in the order of their teams, whose usage is
-- locked after them.
UPDATE builds SET log_bytes = (SELECT COALESCE(sum(pg_column_size(st.log) + 100), 0) FROM build_steps st WHERE st.build_id = builds.id)
WHERE builds.id = ANY (ARRAY(
    SELECT b.id FROM builds b WHERE b.log_bytes IS NULL AND b.state NOT IN ('queued', 'running')
    ORDER BY b.team_id, b.id LIMIT @max_rows FOR NO KEY UPDATE SKIP LOCKED)) RETURNING team_id;

-- name: ForgetBuilds :exec
-- Deletes the oldest builds of a team beyond its limits. It keeps builds with leftovers,
-- and builds whose version a later build would otherwise repeat.
DELETE FROM builds WHERE builds.id = ANY (ARRAY(
    SELECT b.id FROM builds b
    JOIN (SELECT o.id, row_number() OVER w AS n, sum(build_bytes(o.log_bytes, o.recipe)) OVER w AS bytes
        FROM builds o WHERE o.team_id = @team_id AND o.log_bytes IS NOT NULL WINDOW w AS (ORDER BY o.created_at DESC, o.id DESC)) AS all_of_them USING (id)
    WHERE b.team_id = @team_id AND (all_of_them.n > @most::bigint OR all_of_them.bytes > @most_bytes::bigint)
      AND NOT EXISTS (SELECT FROM sandboxes s WHERE s.build_id = b.id AND sandbox_is_live(s.state))
      AND NOT EXISTS (SELECT FROM templates t WHERE t.build_id = b.id AND t.state = 'pending')
      AND (b.version IS NULL
        OR EXISTS (SELECT FROM builds l WHERE l.team_id = b.team_id AND l.name = b.name AND l.version > b.version)
        OR (SELECT max(t.version) FROM templates t WHERE t.team_id = b.team_id AND t.name = b.name AND t.kind = 'template') < b.version IS NOT TRUE)
    ORDER BY b.id FOR UPDATE OF b SKIP LOCKED));

-- name: ListBuildSandboxes :many
SELECT * FROM sandboxes WHERE build_id = @build_id AND sandbox_is_live(state);

-- name: BuildTemplatesGo :many
-- Marks deleting what a build began to capture and did not finish.
UPDATE templates SET state = 'deleting', worker = @worker WHERE templates.id = ANY (ARRAY(
    SELECT t.id FROM templates t WHERE t.build_id = @build_id AND t.state = 'pending' ORDER BY t.id FOR NO KEY UPDATE)) RETURNING *;

-- name: ListBuildLeftovers :many
-- Finished builds with leftovers.
SELECT id FROM builds
WHERE state NOT IN ('queued', 'running')
  AND id IN (SELECT build_id FROM sandboxes WHERE build_id IS NOT NULL AND sandbox_is_live(sandboxes.state)
       UNION SELECT build_id FROM templates WHERE build_id IS NOT NULL AND templates.state = 'pending');

-- name: ClaimBuilt :one
-- Inserts what a build captures: the next version of its name, or a layer, which has no
-- version.
INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, kind, version, vcpus, memory_mib, disk_mib, captured_from, worker, build_id, layer_key)
SELECT @id, @team_id, @name::text, 0, @created_at, 'pending', @kind::text,
    CASE WHEN @kind::text = 'layer' THEN 0 ELSE 1 + GREATEST(
        (SELECT COALESCE(max(t.version), 0) FROM templates AS t WHERE t.team_id = @team_id AND t.name = @name::text AND t.kind = 'template'),
        (SELECT COALESCE(max(b.version), 0) FROM builds AS b WHERE b.team_id = @team_id AND b.name = @name::text)) END,
    @vcpus, @memory_mib, @disk_mib, @captured_from, @worker, @build_id, sqlc.narg('layer_key')
RETURNING *;

-- name: FindLayers :many
-- The layers that a build can start from.
SELECT * FROM templates
WHERE team_id = @team_id AND kind = 'layer' AND state = 'ready' AND layer_key = ANY (@keys::bytea[])
  AND EXISTS (SELECT 1 FROM host_templates JOIN hosts ON hosts.id = host_id WHERE template_id = templates.id AND hosts.status = 'online');

-- name: UseLayer :exec
UPDATE templates SET used_at = now() WHERE id = $1;

-- name: ListUnusedLayers :many
-- Layers that no build has started from for long, or that exceed a team's limit.
SELECT * FROM templates
WHERE templates.kind = 'layer' AND templates.state = 'ready' AND (templates.used_at < @before
   OR (SELECT count(*) FROM templates AS newer WHERE newer.team_id = templates.team_id AND newer.kind = 'layer' AND newer.state = 'ready'
       AND newer.used_at > templates.used_at) >= @most::bigint)
ORDER BY templates.used_at
LIMIT 100;

-- name: AddArchive :execrows
-- Without a size; see SetArchiveSize.
INSERT INTO build_archives (team_id, digest, size_bytes) VALUES ($1, $2, 0) ON CONFLICT DO NOTHING;

-- name: SetArchiveSize :exec
-- Charges the team. Its other charges wait until the transaction ends.
UPDATE build_archives SET size_bytes = @size_bytes WHERE team_id = @team_id AND digest = @digest;

-- name: UseArchive :execrows
UPDATE build_archives SET used_at = now() WHERE team_id = $1 AND digest = $2;

-- name: AddArchiveChunk :exec
INSERT INTO build_archive_chunks (team_id, digest, number, data) VALUES ($1, $2, $3, $4);

-- name: GetArchiveChunk :one
SELECT data FROM build_archive_chunks WHERE team_id = $1 AND digest = $2 AND number = $3;

-- name: SizeOfArchives :one
SELECT COALESCE(sum(size_bytes), 0)::bigint FROM build_archives WHERE team_id = $1;

-- name: ForgetArchives :exec
-- Deletes archives that no queued or running build copies from, in the order of their
-- teams, whose usage is locked after them. A concurrent use gives an archive another
-- ctid, so it stays.
DELETE FROM build_archives WHERE build_archives.ctid = ANY (ARRAY(
    SELECT a.ctid FROM build_archives a WHERE a.used_at < @before
      AND NOT EXISTS (SELECT 1 FROM builds WHERE builds.team_id = a.team_id AND builds.archive = a.digest AND builds.state IN ('queued', 'running'))
    ORDER BY a.team_id, a.digest FOR UPDATE OF a));

-- name: CountOpenBuilds :many
SELECT state, count(*) AS n FROM builds WHERE state IN ('queued', 'running') GROUP BY state;

-- name: InsertChannel :one
-- A mail channel starts confirmed if the team has a confirmed one with the address.
INSERT INTO channels (id, team_id, name, kind, events, target, sealed, confirm_hash, confirm_until, confirmed_at)
VALUES (@id, @team_id, @name, @kind, @events, @target, @sealed, sqlc.narg('confirm_hash'), sqlc.narg('confirm_until'),
    CASE WHEN @kind = 'email' AND EXISTS (SELECT FROM channels o WHERE o.team_id = @team_id AND o.kind = 'email' AND lower(o.target) = lower(@target) AND o.confirmed_at IS NOT NULL) THEN now() END)
RETURNING *;

-- name: AddressConfirmed :one
-- Whether the address is confirmed for another channel of the team.
SELECT EXISTS (SELECT FROM channels WHERE team_id = @team_id AND kind = 'email' AND lower(target) = lower(@address::text) AND confirmed_at IS NOT NULL);

-- name: AskConfirmation :execrows
UPDATE channels SET confirm_hash = @confirm_hash, confirm_until = @confirm_until
WHERE id = @id AND kind = 'email' AND target = @target AND confirmed_at IS NULL;

-- name: ConfirmChannel :execrows
-- Confirms the team's other channels to the same address too.
UPDATE channels SET confirmed_at = now(), confirm_hash = NULL, confirm_until = NULL
WHERE channels.id = ANY (ARRAY(
    SELECT c.id FROM channels c JOIN channels asked ON asked.team_id = c.team_id AND lower(asked.target) = lower(c.target)
    WHERE asked.confirm_hash = @confirm_hash AND asked.confirm_until > now() AND c.kind = 'email' AND c.confirmed_at IS NULL
    ORDER BY c.id FOR NO KEY UPDATE OF c));

-- name: CountChannels :one
SELECT count(*) FROM channels WHERE team_id = $1;

-- name: ListChannels :many
SELECT * FROM channels WHERE team_id = $1 ORDER BY created_at, id;

-- name: GetTeamChannel :one
SELECT * FROM channels WHERE id = $1 AND team_id = $2;

-- name: GetChannelPayer :one
-- A channel with its team's payer, as in GetTeamPayer.
SELECT sqlc.embed(channels), COALESCE(team_owner(team_id), team_id)::uuid AS payer FROM channels WHERE id = $1;

-- name: UpdateChannel :one
-- Enabling it resets its failures. A link sent to the old address does not confirm the
-- new one.
UPDATE channels SET name = COALESCE(sqlc.narg('name'), name), events = COALESCE(sqlc.narg('events')::text[], events),
    target = COALESCE(sqlc.narg('target'), target), sealed = COALESCE(sqlc.narg('sealed')::bytea, sealed),
    enabled = COALESCE(sqlc.narg('enabled')::boolean, enabled),
    failing_since = CASE WHEN sqlc.narg('enabled')::boolean THEN NULL ELSE failing_since END,
    disabled_reason = CASE WHEN sqlc.narg('enabled')::boolean IS NOT NULL THEN '' ELSE disabled_reason END,
    confirmed_at = CASE
        WHEN lower(COALESCE(sqlc.narg('target'), target)) = lower(target) THEN confirmed_at
        WHEN kind = 'email' AND EXISTS (SELECT FROM channels o WHERE o.team_id = @team_id AND o.kind = 'email' AND lower(o.target) = lower(sqlc.narg('target')) AND o.confirmed_at IS NOT NULL) THEN now() END,
    confirm_hash = CASE WHEN lower(COALESCE(sqlc.narg('target'), target)) = lower(target) THEN confirm_hash ELSE sqlc.narg('confirm_hash') END,
    confirm_until = CASE WHEN lower(COALESCE(sqlc.narg('target'), target)) = lower(target) THEN confirm_until ELSE sqlc.narg('confirm_until') END
WHERE channels.id = @id AND channels.team_id = @team_id RETURNING *;

-- name: DeleteChannel :execrows
DELETE FROM channels WHERE id = $1 AND team_id = $2;

-- name: ChannelWorks :exec
UPDATE channels SET failing_since = NULL WHERE id = $1 AND failing_since IS NOT NULL;

-- name: ChannelFails :one
UPDATE channels SET failing_since = COALESCE(failing_since, now()),
    enabled = enabled AND COALESCE(failing_since, now()) > now() - make_interval(secs => @secs::float8),
    disabled_reason = CASE WHEN COALESCE(failing_since, now()) > now() - make_interval(secs => @secs::float8) THEN disabled_reason ELSE @reason::text END
WHERE id = @id RETURNING enabled;

-- name: EmitEvent :exec
SELECT notify_channels(@team::uuid, @event::text, @body::jsonb);

-- name: WasTold :one
-- Whether a team has had an event within the last secs seconds.
SELECT EXISTS (SELECT 1 FROM deliveries JOIN channels ON channels.id = deliveries.channel_id
    WHERE channels.team_id = @team_id AND deliveries.event = @event AND deliveries.created_at > now() - make_interval(secs => @secs::float8));

-- name: InsertDelivery :one
-- Inserts a delivery that is being attempted.
INSERT INTO deliveries (id, channel_id, event, body, attempts, tried_at, state) VALUES ($1, $2, $3, $4, 1, now(), 'failed') RETURNING *;

-- name: ClaimDelivery :one
-- Claims a due delivery until the claim expires, of a channel and a payer below their
-- limits.
UPDATE deliveries SET attempts = attempts + 1, tried_at = now(), next_at = now() + make_interval(secs => @secs::float8)
WHERE id = (
    SELECT d.id FROM deliveries d JOIN channels c ON c.id = d.channel_id
    WHERE d.state = 'pending' AND d.next_at <= now() AND c.id <> ALL (@busy_channels::uuid[]) AND c.team_id <> ALL (@busy_payers::uuid[])
      AND c.team_id NOT IN (SELECT m.team_id FROM team_members m WHERE m.user_id = ANY (@busy_payers::uuid[]) AND m.role = 'owner' AND team_owner(m.team_id) = m.user_id)
    ORDER BY d.next_at LIMIT 1 FOR UPDATE OF d SKIP LOCKED)
RETURNING *;

-- name: NextDelivery :one
-- Seconds until [ClaimDelivery] will return one.
SELECT COALESCE(EXTRACT(EPOCH FROM min(d.next_at) - now()), 3600)::float8 AS secs FROM deliveries d JOIN channels c ON c.id = d.channel_id
WHERE d.state = 'pending' AND c.id <> ALL (@busy_channels::uuid[]) AND c.team_id <> ALL (@busy_payers::uuid[])
  AND c.team_id NOT IN (SELECT m.team_id FROM team_members m WHERE m.user_id = ANY (@busy_payers::uuid[]) AND m.role = 'owner' AND team_owner(m.team_id) = m.user_id);

-- name: DeliveryTried :exec
UPDATE deliveries SET state = @state, next_at = now() + make_interval(secs => @secs::float8), took_ms = @took_ms, status = @status, error = @error WHERE id = @id;

-- name: DelayDeliveries :exec
-- Delays the pending deliveries of a channel. Does not count the attempt at the claimed
-- one, which was not made.
UPDATE deliveries SET next_at = CASE WHEN deliveries.id = @claimed THEN now() + make_interval(secs => @secs::float8) ELSE GREATEST(deliveries.next_at, now() + make_interval(secs => @secs::float8)) END,
    attempts = deliveries.attempts - CASE WHEN deliveries.id = @claimed THEN 1 ELSE 0 END
WHERE deliveries.id = ANY (ARRAY(
    SELECT d.id FROM deliveries d WHERE d.channel_id = @channel_id AND d.state = 'pending' ORDER BY d.id FOR UPDATE));

-- name: ListDeliveries :many
SELECT * FROM deliveries WHERE channel_id = @channel_id AND (created_at, id) < (@before_at::timestamptz, @before_id::uuid)
ORDER BY created_at DESC, id DESC LIMIT @max_rows;

-- name: ForgetDeliveries :execrows
DELETE FROM deliveries WHERE deliveries.id = ANY (ARRAY(
    SELECT going.id FROM deliveries going WHERE going.id = ANY (ARRAY(SELECT d.id FROM deliveries d WHERE d.created_at < @before ORDER BY d.created_at LIMIT @max_rows))
    ORDER BY going.id FOR UPDATE));

-- name: TrimDeliveries :execrows
-- Keeps the newest deliveries of each channel.
DELETE FROM deliveries WHERE deliveries.id = ANY (ARRAY(
    SELECT going.id FROM deliveries going WHERE going.id = ANY (ARRAY(
        SELECT many.id FROM (SELECT d.id, row_number() OVER (PARTITION BY d.channel_id ORDER BY d.created_at DESC, d.id DESC) AS n FROM deliveries d) many
        WHERE many.n > @keep::bigint LIMIT @max_rows))
    ORDER BY going.id FOR UPDATE));

-- name: CountPendingDeliveries :one
-- Pending deliveries: due now, or being attempted or waiting for the next attempt.
SELECT count(*) FILTER (WHERE next_at <= now()) AS due, count(*) FILTER (WHERE next_at > now()) AS later FROM deliveries WHERE state = 'pending';

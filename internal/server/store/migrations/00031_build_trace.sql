-- +goose Up

-- The span of the request that created the build, as a W3C traceparent. Empty: it is not
-- traced.
ALTER TABLE builds ADD trace text NOT NULL DEFAULT '';

-- +goose Down
ALTER TABLE builds DROP trace;

-- +goose Up

-- What the request with a key created: a sandbox, the first of several forks, or a
-- template. A template that could not be captured, or was deleted, takes its key along.
ALTER TABLE idempotency_keys
    ALTER sandbox_id DROP NOT NULL,
    ADD copies uuid[] NOT NULL DEFAULT '{}',
    ADD template_id uuid REFERENCES templates ON DELETE CASCADE,
    ADD CHECK (num_nonnulls(sandbox_id, template_id) = 1);
CREATE INDEX idempotency_keys_template ON idempotency_keys (template_id) WHERE template_id IS NOT NULL;

-- +goose Down
DELETE FROM idempotency_keys WHERE sandbox_id IS NULL;
ALTER TABLE idempotency_keys DROP template_id, DROP copies, ALTER sandbox_id SET NOT NULL;

#!/usr/bin/env bash
# The API with curl and jq: creates a sandbox, writes a file, runs a command, and deletes
# the sandbox.
set -euo pipefail

api() {
	local method=$1 path=$2
	shift 2
	curl -fsS -X "$method" "$WRENN_URL/v1$path" -H "X-API-Key: $WRENN_API_KEY" "$@"
}

id=$(api POST /sandboxes -H 'Content-Type: application/json' \
	-d '{"timeout_seconds": 300, "metadata": {"example": "curl"}}' | jq -r .id)
trap 'api DELETE "/sandboxes/$id"' EXIT

echo 'print(6 * 7)' | api PUT "/sandboxes/$id/files?path=/home/user/answer.py" \
	-H 'Content-Type: application/octet-stream' --data-binary @- >/dev/null
api POST "/sandboxes/$id/exec" -H 'Content-Type: application/json' \
	-d '{"cmd": "python3", "args": ["answer.py"]}' | jq -r .stdout

#!/usr/bin/env bash
# Builds a template whose web server is already running when a sandbox of it starts.
set -euo pipefail
cd "$(dirname "$0")"

# The recipe installs no packages, so the build need not fetch the lists of packages.
wrenn build -t example --step-timeout 5m --skip-pre-post . >&2
id=$(wrenn create -t example --metadata example=build)
trap 'wrenn rm "$id" >&2; wrenn template rm example >&2' EXIT
curl -fsS -H "X-API-Key: $WRENN_API_KEY" "$(wrenn url "$id" 8000)"

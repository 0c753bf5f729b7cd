#!/usr/bin/env bash
# The table of docs/serving.md: a server without ApET, then with 64 and with 32 tokens, measured by `apet.bench serve`:
#
#   bash scripts/serve_speed.sh [flags of apet.bench serve]      e.g. --concurrency 1,4
#
#   TOKENS_LIST   budgets (64 32); the rest of the environment is that of scripts/serve.sh
#   SERVER_FLAGS  flags of vllm serve for all servers, e.g. "--dtype float32"
#   OUT           folder for the servers' logs and the figures as JSON (runs/serve_speed)
#
# Run it on a machine that does nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_vllm.sh
apet_vllm_env
export APET_VENV PORT=${PORT:-8000}
out=${OUT:-runs/serve_speed}
mkdir -p "$out"

measure() { # tokens, further flags of the bench
    local tokens=$1
    shift
    # shellcheck disable=SC2086 # several words
    TOKENS=$tokens bash scripts/serve.sh ${SERVER_FLAGS:-} >"$out/$tokens.log" 2>&1 &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    until curl --silent --fail "localhost:$PORT/health" >/dev/null; do
        kill -0 $server 2>/dev/null || { tail -n 20 "$out/$tokens.log" >&2; exit 1; }
        sleep 1
    done
    "$PYTHON" -m apet.bench serve --server "http://localhost:$PORT" --json "$out/$tokens.json" "$@"
    kill $server
    wait $server || true
}

measure none "$@"
for tokens in ${TOKENS_LIST:-64 32}; do measure "$tokens" --baseline "$out/none.json" "$@"; done

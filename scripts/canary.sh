#!/usr/bin/env bash
# Tries the newest transformers there is, bound or no bound, and says whether ApET runs on it and what breaks.
#
#   bash scripts/canary.sh
#
# Exit status 0: the bound in requirements.txt and apet/adapters/host.py can be raised (CONTRIBUTING.md says how).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_env test || exit

mkdir -p runs/hosts
log=runs/hosts/canary.log
bash scripts/hosts.sh "transformers" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
echo
if [ "$status" -eq 0 ]; then
    echo "canary: alive, $(tail -n 1 "$log")"
else
    echo "canary: dead, $(tail -n 1 "$log"). What broke:"
    grep -E '^(FAILED|ERROR)' "$log" | sed -E 's/^(FAILED|ERROR) //; s/ - / : /' | sort | uniq -c | sort -rn | head -n 40
fi
exit "$status"

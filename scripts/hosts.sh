#!/usr/bin/env bash
# Runs the contract suite (the tests marked `host`: what a release of transformers could break) on other releases of
# transformers. Everything else stays as in the test environment; each release lies in a folder of its own in runs/hosts.
#
#   bash scripts/hosts.sh [REQUIREMENT ...]     default: the oldest and the newest release that requirements.txt allows
#   bash scripts/hosts.sh transformers==5.20.2 transformers==5.22.2
#
# Ends with one line per release; exit status 1 if any of them fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_env test || exit

allowed=$(grep '^transformers' requirements.txt)
if [ $# -eq 0 ]; then
    oldest=${allowed#transformers>=}
    set -- "transformers==${oldest%%,*}.0" "$allowed"
fi
used=$("$PYTHON" -c 'import transformers; print(transformers.__version__)')

mkdir -p runs/hosts
verdicts=() failed=0
for requirement in "$@"; do
    echo
    echo "== $requirement"
    if ! "$PYTHON" -m pip install --quiet --dry-run --ignore-installed --no-deps --report runs/hosts/report.json "$requirement"; then
        verdicts+=("$requirement: could not be found") failed=1
        continue
    fi
    version=$("$PYTHON" -c 'import json; print(json.load(open("runs/hosts/report.json"))["install"][0]["metadata"]["version"])')
    if [ "$version" = "$used" ]; then
        verdicts+=("transformers $version: what the test environment has; bash scripts/test.sh covers it")
        continue
    fi
    folder=runs/hosts/$(echo "$requirement" | tr -c 'A-Za-z0-9.\n' '-')
    rm -rf "$folder"
    if ! "$PYTHON" -m pip install --quiet --upgrade --target "$folder" "$requirement"; then
        verdicts+=("$requirement: could not be installed") failed=1
    elif PYTHONPATH=$folder "$PYTHON" -m pytest -q --dist worksteal -n auto --maxprocesses 8 -m "host and not slow"; then
        verdicts+=("transformers $version: passes")
    else
        verdicts+=("transformers $version: FAILS") failed=1
    fi
done
echo
printf '%s\n' "${verdicts[@]}"
exit $failed

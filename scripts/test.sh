#!/usr/bin/env bash
# Runs the tests in the environment of scripts/_env.sh, one process per core: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_env test
exec "$PYTHON" -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"

#!/usr/bin/env bash
# Tests ApET inside a real lmms-eval, and benchmarks from data sets of the hub (lmms-eval brings the package datasets), in
# an environment of its own (.venv/lmms-eval, made on first use):
#
#   bash scripts/test_lmms_eval.sh [pytest arguments]
#
# APET_VENV names another environment, or "none" for the active one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
export APET_VENV=${APET_VENV:-.venv/lmms-eval}
# lmms-eval does not know the filelock of constraints.txt yet.
export APET_PINS=${APET_PINS:-filelock<4}
apet_env test lmms-eval
exec "$PYTHON" -m pytest -q -p no:cacheprovider tests/harness tests/eval/test_hub.py "$@"

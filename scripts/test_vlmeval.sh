#!/usr/bin/env bash
# Tests ApET inside a real VLMEvalKit, as the distribution ms-vlmeval has it, in an environment of its own (.venv/vlmeval,
# made on first use):
#
#   bash scripts/test_vlmeval.sh [pytest arguments]
#
# APET_VENV names another environment, or "none" for the active one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_test_apart vlmeval tests/harness/test_vlmevalkit.py "$@"

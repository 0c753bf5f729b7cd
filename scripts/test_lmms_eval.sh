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
# lmms-eval does not know the filelock of constraints.txt yet; its wandb keeps protobuf below 7, which the newest sentencepiece
# needs to read a tokenizer.model.
export APET_PINS=${APET_PINS:-filelock<4 sentencepiece<0.2.3}
apet_test_apart lmms-eval tests/harness/test_lmms_eval.py tests/eval/test_hub.py "$@"

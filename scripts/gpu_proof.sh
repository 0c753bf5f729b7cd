#!/usr/bin/env bash
# Measures everything a GPU has to show, in minutes and without a network: bash scripts/gpu_proof.sh [--dry_run]
#
#   OUT_DIR     folder of gpu_proof.json, gpu_proof.md and the log of the tests (default: runs/gpu_proof)
#   BUDGET      seconds for all parts (default: 480); what does not fit is left out and said
#   PARTS       which parts, in this order, separated by spaces or commas (default: all; --help lists them)
#
# --dry_run runs the same parts on a CPU with small models. PYTHON and APET_VENV as in scripts/_env.sh: on a bare machine
# with torch and transformers, APET_VENV=none PYTHON=python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_env test

budget=${BUDGET:-480}
flags=(--out "${OUT_DIR:-runs/gpu_proof}" --seconds "$budget")
[[ -z "${PARTS:-}" ]] || flags+=(--parts "$PARTS")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRANSFORMERS_DISABLE_TORCH_CHECK=1
# A call that hangs on the device is ended; what the parts before it wrote stays.
exec timeout --kill-after=10 "$((${budget%.*} + 60))" "$PYTHON" -m apet.bench.proof "${flags[@]}" "$@"

#!/usr/bin/env bash
# From a fresh clone to a benchmark score: installs into .venv, runs GQA on the bundled sample with and without ApET,
# and prints both. Needs no GPU. Started again after an interruption, it goes on where it stopped.
#
#   bash scripts/quickstart.sh [TOKENS]     TOKENS: 192, 128 or 64 (default) visual tokens averaged over the layers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh
apet_env

export MODEL=data/sample/model/llava-v1.5-sample DATA=data/sample/eval OUT=runs/quickstart
export BATCH_SIZE=${BATCH_SIZE:-16} NUM_WORKERS=${NUM_WORKERS:-1} METHOD=apet
BUDGET=${1:-64}

echo
echo "== GQA without compression"
EXPERIMENT=none TOKENS=none bash scripts/llava1_5/gqa.sh
echo
echo "== GQA with ApET, $BUDGET visual tokens"
EXPERIMENT=apet-$BUDGET TOKENS=$BUDGET bash scripts/llava1_5/gqa.sh
echo
echo "== Both runs"
"$PYTHON" -m apet report $OUT

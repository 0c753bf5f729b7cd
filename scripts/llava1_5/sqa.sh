#!/usr/bin/env bash
# ScienceQA test with LLaVA-1.5, to accuracy and IMG-accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
SQA=$DATA/scienceqa
budget 192 16
OUT=${OUT:-$SQA}
need "$MODEL" "checkpoint"
need "$SQA/llava_test_CQM-A.json" "ScienceQA question file"
need "$SQA/problems.json" "ScienceQA answers"

ANSWERS=$OUT/answers/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_science "$ANSWERS" --question-file "$SQA/llava_test_CQM-A.json" \
  --image-folder "${IMAGE_FOLDER:-$SQA/images/test}" --single-pred-prompt --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" -m llava.eval.eval_science_qa --base-dir "$SQA" --result-file "$ANSWERS" \
  --output-file "${ANSWERS%.jsonl}_output.jsonl" --output-result "${ANSWERS%.jsonl}_result.json" \
  --output-json "${ANSWERS%.jsonl}.score.json"

#!/usr/bin/env bash
# POPE with LLaVA-1.5, to the three F1 scores and their mean. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
POPE=$DATA/pope
budget 192 16
OUT=${OUT:-$POPE}
need "$MODEL" "checkpoint"
need "$POPE/llava_pope_test.jsonl" "POPE question file"
need "$POPE/coco" "folder of POPE labels"

ANSWERS=$OUT/answers/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_loader "$ANSWERS" --benchmark pope --question-file "$POPE/llava_pope_test.jsonl" \
  --image-folder "${IMAGE_FOLDER:-$POPE/val2014}" --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" -m llava.eval.eval_pope --annotation-dir "$POPE/coco" --question-file "$POPE/llava_pope_test.jsonl" \
  --result-file "$ANSWERS" --output-json "${ANSWERS%.jsonl}.score.json"

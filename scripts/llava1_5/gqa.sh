#!/usr/bin/env bash
# GQA test-dev balanced with LLaVA-1.5, to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
SPLIT=llava_gqa_testdev_balanced
GQA=$DATA/gqa
budget 64 16
OUT=${OUT:-$GQA}
need "$MODEL" "checkpoint"
need "$GQA/$SPLIT.jsonl" "GQA question file"
need "$GQA/testdev_balanced_questions.json" "GQA answers"

ANSWERS=$OUT/answers/$SPLIT/$EXPERIMENT/merge.jsonl
answer llava.eval.model_vqa_loader "$ANSWERS" --benchmark gqa --question-file "$GQA/$SPLIT.jsonl" \
  --image-folder "${IMAGE_FOLDER:-$GQA/images}" --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" scripts/convert_gqa_for_eval.py --src "$ANSWERS" --dst "$OUT/answers/$SPLIT/$EXPERIMENT/testdev_balanced_predictions.json"
"$PYTHON" -m llava.eval.eval_gqa --tier testdev_balanced --questions "$GQA/{tier}_questions.json" \
  --predictions "$OUT/answers/$SPLIT/$EXPERIMENT/{tier}_predictions.json" --output-json "${ANSWERS%.jsonl}.score.json"

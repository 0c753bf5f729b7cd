#!/usr/bin/env bash
# VizWiz test with LLaVA-1.5, to the upload file of its server. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
VIZWIZ=$DATA/vizwiz
budget 192 16
OUT=${OUT:-$VIZWIZ}
need "$MODEL" "checkpoint"
need "$VIZWIZ/llava_test.jsonl" "VizWiz question file"

ANSWERS=$OUT/answers/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_loader "$ANSWERS" --benchmark vizwiz --question-file "$VIZWIZ/llava_test.jsonl" \
  --image-folder "${IMAGE_FOLDER:-$VIZWIZ/test}" --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" scripts/convert_vizwiz_for_submission.py --annotation-file "$VIZWIZ/llava_test.jsonl" \
  --result-file "$ANSWERS" --result-upload-file "$OUT/answers_upload/$EXPERIMENT.json"

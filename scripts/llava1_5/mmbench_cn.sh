#!/usr/bin/env bash
# MMBench-CN dev with LLaVA-1.5, to the upload file of its server and the local circular accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
SPLIT=${SPLIT:-mmbench_dev_cn_20231003}
MMBENCH=$DATA/mmbench
budget 192 16
OUT=${OUT:-$MMBENCH}
need "$MODEL" "checkpoint"
need "$MMBENCH/$SPLIT.tsv" "MMBench-CN table"

ANSWERS=$OUT/answers/$SPLIT/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_mmbench "$ANSWERS" --benchmark mmbench_cn --question-file "$MMBENCH/$SPLIT.tsv" --lang cn \
  --single-pred-prompt --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" scripts/convert_mmbench_for_submission.py --annotation-file "$MMBENCH/$SPLIT.tsv" \
  --result-dir "$OUT/answers/$SPLIT" --upload-dir "$OUT/answers_upload/$SPLIT" --experiment "$EXPERIMENT"
"$PYTHON" -m llava.eval.eval_mmbench --annotation-file "$MMBENCH/$SPLIT.tsv" --result-file "$ANSWERS" --lang cn \
  --output-json "${ANSWERS%.jsonl}.score.json"

#!/usr/bin/env bash
# VQAv2 test-dev with LLaVA-1.5, to the upload file of its server. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
SPLIT=${SPLIT:-llava_vqav2_mscoco_test-dev2015}
VQAV2=$DATA/vqav2
budget 192 16
need "$MODEL" "checkpoint"
need "$VQAV2/$SPLIT.jsonl" "VQAv2 question file"
need "$VQAV2/llava_vqav2_mscoco_test2015.jsonl" "list of all VQAv2 test questions"

answer llava.eval.model_vqa_loader "$VQAV2/answers/$SPLIT/$EXPERIMENT/merge.jsonl" --benchmark vqav2 \
  --question-file "$VQAV2/$SPLIT.jsonl" --image-folder "${IMAGE_FOLDER:-$VQAV2/test2015}" \
  --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" scripts/convert_vqav2_for_submission.py --dir "$VQAV2" --split "$SPLIT" --ckpt "$EXPERIMENT"

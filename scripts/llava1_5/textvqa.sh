#!/usr/bin/env bash
# TextVQA validation with LLaVA-1.5 (OCR tokens in the prompt), to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
TEXTVQA=$DATA/textvqa
budget 192 16
OUT=${OUT:-$TEXTVQA}
need "$MODEL" "checkpoint"
need "$TEXTVQA/llava_textvqa_val_v051_ocr.jsonl" "TextVQA question file"
need "$TEXTVQA/TextVQA_0.5.1_val.json" "TextVQA answers"

ANSWERS=$OUT/answers/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_loader "$ANSWERS" --benchmark textvqa --question-file "$TEXTVQA/llava_textvqa_val_v051_ocr.jsonl" \
  --image-folder "${IMAGE_FOLDER:-$TEXTVQA/train_images}" --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" -m llava.eval.eval_textvqa --annotation-file "$TEXTVQA/TextVQA_0.5.1_val.json" --result-file "$ANSWERS" \
  --output-json "${ANSWERS%.jsonl}.score.json"

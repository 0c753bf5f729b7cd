# shellcheck shell=bash
# TextVQA validation, to accuracy. Sourced by scripts/_common.sh.
TEXTVQA=$DATA/textvqa
OCR=${OCR:-$FAMILY_OCR}
if [ "$OCR" != "$FAMILY_OCR" ]; then variant "ocr$OCR"; fi
RESULT=$OUT/textvqa/answers
ANSWERS=$RESULT/$EXPERIMENT.jsonl
QUESTIONS=$TEXTVQA/llava_textvqa_val_v051_ocr.jsonl
IMAGE_FOLDER=${IMAGE_FOLDER:-$TEXTVQA/train_images}
need "$QUESTIONS" "TextVQA question file"
need "$TEXTVQA/TextVQA_0.5.1_val.json" "TextVQA answers"
need "$IMAGE_FOLDER" "folder of TextVQA images"

case "$OCR" in
  1) ;;
  0)
    step "$PYTHON" scripts/textvqa_without_ocr.py --src "$QUESTIONS" --dst "$RESULT/questions_without_ocr.jsonl"
    QUESTIONS=$RESULT/questions_without_ocr.jsonl
    ;;
  *) fail "OCR=$OCR must be 1 (OCR tokens in the prompt) or 0" ;;
esac
answer llava.eval.model_vqa_loader "$ANSWERS" "$QUESTIONS" --benchmark textvqa --image-folder "$IMAGE_FOLDER"
step "$PYTHON" -m llava.eval.eval_textvqa --annotation-file "$TEXTVQA/TextVQA_0.5.1_val.json" --result-file "$ANSWERS" \
  --output-json "$RESULT/$EXPERIMENT.score.json"

# shellcheck shell=bash
# GQA test-dev balanced, to accuracy. Sourced by scripts/_common.sh.
GQA=$DATA/gqa
SPLIT=llava_gqa_testdev_balanced
RESULT=$OUT/gqa/answers/$SPLIT/$EXPERIMENT
ANSWERS=$RESULT/merge.jsonl
need "$GQA/$SPLIT.jsonl" "GQA question file"
need "$GQA/testdev_balanced_questions.json" "GQA answers"
IMAGE_FOLDER=${IMAGE_FOLDER:-$(first_of "$GQA/images" "$GQA/data/images")}
need "$IMAGE_FOLDER" "folder of GQA images"

answer llava.eval.model_vqa_loader "$ANSWERS" "$GQA/$SPLIT.jsonl" --benchmark gqa --image-folder "$IMAGE_FOLDER"
step "$PYTHON" scripts/convert_gqa_for_eval.py --src "$ANSWERS" --dst "$RESULT/testdev_balanced_predictions.json"
SCORING=(--tier testdev_balanced --questions "$(absolute "$GQA")/{tier}_questions.json"
  --predictions "$(absolute "$RESULT")/{tier}_predictions.json")
step "$PYTHON" -m llava.eval.eval_gqa "${SCORING[@]}" --output-json "$RESULT/merge.score.json"
official "$(first_of "$GQA/eval.py" "$GQA/data/eval.py" "$GQA/data/eval/eval.py")" "${SCORING[@]}"

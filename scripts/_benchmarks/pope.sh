# shellcheck shell=bash
# POPE, to the three F1 scores and their mean. Sourced by scripts/_common.sh.
POPE=$DATA/pope
RESULT=$OUT/pope/answers
ANSWERS=$RESULT/$EXPERIMENT.jsonl
QUESTIONS=$POPE/llava_pope_test.jsonl
IMAGE_FOLDER=${IMAGE_FOLDER:-$POPE/val2014}
need "$QUESTIONS" "POPE question file"
for split in random popular adversarial; do need "$POPE/coco/coco_pope_$split.json" "POPE labels"; done
need "$IMAGE_FOLDER" "folder of POPE images"

answer llava.eval.model_vqa_loader "$ANSWERS" "$QUESTIONS" --benchmark pope --image-folder "$IMAGE_FOLDER"
step "$PYTHON" -m llava.eval.eval_pope --annotation-dir "$POPE/coco" --question-file "$QUESTIONS" \
  --result-file "$ANSWERS" --output-json "$RESULT/$EXPERIMENT.score.json"

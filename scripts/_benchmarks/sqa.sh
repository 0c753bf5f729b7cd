# shellcheck shell=bash
# ScienceQA test, to accuracy and IMG-accuracy. Sourced by scripts/_common.sh.
SQA=$DATA/scienceqa
RESULT=$OUT/scienceqa/answers/$EXPERIMENT
ANSWERS=$RESULT.jsonl
IMAGE_FOLDER=${IMAGE_FOLDER:-$SQA/images/test}
need "$SQA/llava_test_CQM-A.json" "ScienceQA question file"
need "$SQA/problems.json" "ScienceQA answers"
need "$SQA/pid_splits.json" "ScienceQA splits"
need "$IMAGE_FOLDER" "folder of ScienceQA images"

answer llava.eval.model_vqa_science "$ANSWERS" "$SQA/llava_test_CQM-A.json" --image-folder "$IMAGE_FOLDER" \
  --single-pred-prompt
step "$PYTHON" -m llava.eval.eval_science_qa --base-dir "$SQA" --result-file "$ANSWERS" \
  --output-file "${RESULT}_output.jsonl" --output-result "${RESULT}_result.json" --output-json "$RESULT.score.json"

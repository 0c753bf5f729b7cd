# shellcheck shell=bash
# VQAv2 test-dev, to the upload file of its server; with ANNOTATIONS=<file> of a split with published answers, to the
# official accuracy. Sourced by scripts/_common.sh.
VQAV2=$DATA/vqav2
SPLIT=${SPLIT:-llava_vqav2_mscoco_test-dev2015}
TEST=$VQAV2/llava_vqav2_mscoco_test2015.jsonl
RESULT=$OUT/vqav2/answers/$SPLIT/$EXPERIMENT
ANSWERS=$RESULT/merge.jsonl
IMAGE_FOLDER=${IMAGE_FOLDER:-$VQAV2/test2015}
need "$VQAV2/$SPLIT.jsonl" "VQAv2 question file"
need "${ANNOTATIONS:-$TEST}" "VQAv2 annotations or list of all test questions"
need "$IMAGE_FOLDER" "folder of VQAv2 images"

answer llava.eval.model_vqa_loader "$ANSWERS" "$VQAV2/$SPLIT.jsonl" --benchmark vqav2 --image-folder "$IMAGE_FOLDER"
if [ -n "${ANNOTATIONS:-}" ]; then
  step "$PYTHON" -m llava.eval.eval_vqav2 --annotation-file "$ANNOTATIONS" --result-file "$ANSWERS" \
    --output-json "$RESULT/merge.score.json"
else
  link_into "$OUT/vqav2" "$TEST" "$VQAV2/$SPLIT.jsonl"
  step "$PYTHON" scripts/convert_vqav2_for_submission.py --dir "$OUT/vqav2" --split "$SPLIT" --ckpt "$EXPERIMENT"
  dry_run || echo "to upload to the VQAv2 server: $OUT/vqav2/answers_upload/$SPLIT/$EXPERIMENT.json"
fi

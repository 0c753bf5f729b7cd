# shellcheck shell=bash
# VizWiz test, to the upload file of its server. Sourced by scripts/_common.sh.
VIZWIZ=$DATA/vizwiz
ANSWERS=$OUT/vizwiz/answers/$EXPERIMENT.jsonl
QUESTIONS=$VIZWIZ/llava_test.jsonl
UPLOAD=$OUT/vizwiz/answers_upload/$EXPERIMENT.json
IMAGE_FOLDER=${IMAGE_FOLDER:-$VIZWIZ/test}
need "$QUESTIONS" "VizWiz question file"
need "$IMAGE_FOLDER" "folder of VizWiz images"

answer llava.eval.model_vqa_loader "$ANSWERS" "$QUESTIONS" --benchmark vizwiz --image-folder "$IMAGE_FOLDER"
step "$PYTHON" scripts/convert_vizwiz_for_submission.py --annotation-file "$QUESTIONS" --result-file "$ANSWERS" \
  --result-upload-file "$UPLOAD"
dry_run || echo "to upload to the VizWiz server: $UPLOAD"

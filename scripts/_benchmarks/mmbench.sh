# shellcheck shell=bash
# MMBench dev, to the local circular accuracy and the upload file of its server. Sourced by scripts/_common.sh;
# mmbench_cn.sh sets MM_LANG and SPLIT for the Chinese one.
MM_LANG=${MM_LANG:-en}
SPLIT=${SPLIT:-mmbench_dev_20230712}
TABLE=$(first_of "$DATA/mmbench/$SPLIT.tsv" "$DATA/mmbench_cn/$SPLIT.tsv")
RESULT=$OUT/mmbench/answers/$SPLIT
ANSWERS=$RESULT/$EXPERIMENT.jsonl
UPLOAD=$OUT/mmbench/answers_upload/$SPLIT
need "$TABLE" "MMBench table"

answer llava.eval.model_vqa_mmbench "$ANSWERS" "$TABLE" --benchmark "$BENCHMARK" --lang "$MM_LANG" --single-pred-prompt
if [[ $SPLIT == *_test_* ]]; then
  echo "the answers of $SPLIT are with the server; only the upload file is written"
else
  step "$PYTHON" -m llava.eval.eval_mmbench --annotation-file "$TABLE" --result-file "$ANSWERS" --lang "$MM_LANG" \
    --output-json "$RESULT/$EXPERIMENT.score.json"
fi
step "$PYTHON" scripts/convert_mmbench_for_submission.py --annotation-file "$TABLE" --result-dir "$RESULT" \
  --upload-dir "$UPLOAD" --experiment "$EXPERIMENT"
dry_run || echo "to upload to the MMBench server: $UPLOAD/$EXPERIMENT.xlsx"

# shellcheck shell=bash
# Open-ended questions about videos, to normalised accuracy and, with JUDGE, to the accuracy a judge gives. Sourced by the
# benchmarks, which set VIDEO_QA, the folder of the data set, and VIDEOS, that of its videos in it.
VIDEO_QA=GPT_Zero_Shot_QA/$VIDEO_QA
RESULT=$OUT/$VIDEO_QA/$EXPERIMENT
ANSWERS=$RESULT/merge.jsonl
IMAGE_FOLDER=${IMAGE_FOLDER:-$DATA/$VIDEO_QA/$VIDEOS}
need "$DATA/$VIDEO_QA/test_q.json" "questions"
need "$DATA/$VIDEO_QA/test_a.json" "answers"
need "$IMAGE_FOLDER" "folder of videos"

answer llava.eval.video_qa "$ANSWERS" "$DATA/$VIDEO_QA/test_q.json" --benchmark "$BENCHMARK" \
  --gt_file_answers "$DATA/$VIDEO_QA/test_a.json" --video_dir "$IMAGE_FOLDER"
SCORING=(--pred_path "$ANSWERS" --benchmark "$BENCHMARK" --output_json "$RESULT/merge.score.json")
if [ -z "${JUDGE:-}" ]; then
  step "$PYTHON" -m llava.eval.eval_video_qa "${SCORING[@]}"
else
  step "$PYTHON" -m llava.eval.eval_video_qa "${SCORING[@]}" --judge "$JUDGE" \
    --output_dir "$RESULT/judge-${JUDGE//[^A-Za-z0-9._-]/_}"
fi

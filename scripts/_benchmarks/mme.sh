# shellcheck shell=bash
# MME, to the perception and cognition scores. Sourced by scripts/_common.sh.
MME=$DATA/MME
RELEASE=$MME/MME_Benchmark_release_version
ANSWERS=$OUT/MME/answers/$EXPERIMENT.jsonl
TABLES=$OUT/MME/eval_tool/answers/$EXPERIMENT
IMAGE_FOLDER=${IMAGE_FOLDER:-$(first_of "$RELEASE/MME_Benchmark" "$RELEASE")}
need "$MME/llava_mme.jsonl" "MME question file"
need "$RELEASE" "MME ground truth"
need "$IMAGE_FOLDER" "folder of MME images"

answer llava.eval.model_vqa_loader "$ANSWERS" "$MME/llava_mme.jsonl" --benchmark mme --image-folder "$IMAGE_FOLDER"
link_into "$OUT/MME" "$RELEASE"
step "$PYTHON" scripts/convert_answer_to_mme.py --dir "$OUT/MME" --experiment "$EXPERIMENT"
PART=()
if [ "${MME_PART:-0}" != 0 ]; then PART=(--present-only); fi
step "$PYTHON" -m llava.eval.eval_mme --results_dir "$TABLES" --output-json "${ANSWERS%.jsonl}.score.json" \
  ${PART[@]+"${PART[@]}"}
official "$MME/eval_tool/calculation.py" --results_dir "$(absolute "$TABLES")"

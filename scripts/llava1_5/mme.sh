#!/usr/bin/env bash
# MME with LLaVA-1.5, to the perception and cognition scores. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
MODEL=${MODEL:-data/model/llava-v1.5-7b}
MME=$DATA/MME
budget 192 16
need "$MODEL" "checkpoint"
need "$MME/llava_mme.jsonl" "MME question file"
need "$MME/MME_Benchmark_release_version" "MME images and ground truth"

IMAGES=$MME/MME_Benchmark_release_version
if [ -d "$IMAGES/MME_Benchmark" ]; then IMAGES=$IMAGES/MME_Benchmark; fi
ANSWERS=$MME/answers/$EXPERIMENT.jsonl
answer llava.eval.model_vqa_loader "$ANSWERS" --benchmark mme --question-file "$MME/llava_mme.jsonl" \
  --image-folder "${IMAGE_FOLDER:-$IMAGES}" --temperature 0 --conv-mode vicuna_v1 "$@"
"$PYTHON" scripts/convert_answer_to_mme.py --dir "$MME" --experiment "$EXPERIMENT"
"$PYTHON" -m llava.eval.eval_mme --results_dir "$MME/eval_tool/answers/$EXPERIMENT" \
  --output-json "${ANSWERS%.jsonl}.score.json"

# Sourced by scripts/<model>/<benchmark>.sh: settings from the environment, chunks over GPUs, budgets.
#
#   MODEL             checkpoint folder            DATA             folder of the benchmarks (data/eval)
#   TOKENS            192, 128, 64 or none: published budgets, tokens per image averaged over the layers
#   METHOD            compression method (apet)    VISUAL_TOKEN_NUM, LAYER_LIST, IMAGE_TOKEN_LIST, BASIS_TOKEN_NUM
#   EXPERIMENT        name of answers and scores   OUT              where answers go (the benchmark's folder)
#   BATCH_SIZE, NUM_WORKERS, DTYPE, DEVICE         as the flags of the same name
#   CUDA_VISIBLE_DEVICES                           one process per GPU; CHUNKS overrides their number
#   PYTHON            interpreter (.venv/bin/python if there is one, else python3)
#
# Arguments of a script are handed to the answering program, e.g. --limit 100. A script that was interrupted goes on
# where it stopped when it is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
DATA=${DATA:-data/eval}
METHOD=${METHOD:-apet}
BASIS_TOKEN_NUM=${BASIS_TOKEN_NUM:-10}

fail() {
  echo "error: $*" >&2
  exit 1
}

# need FILE WHAT: stop with a sentence when an input is missing.
need() {
  [ -e "$1" ] || fail "$2 not found: $1 (data/README.md says where it comes from; DATA and MODEL change the folders)"
}

# budget TOKENS LAYER: the published token budgets, unless the environment gives others.
budget() {
  local tokens=${TOKENS:-$1} layer=$2
  case "$tokens" in
    192) VISUAL_TOKEN_NUM=${VISUAL_TOKEN_NUM:-288} IMAGE_TOKEN_LIST=${IMAGE_TOKEN_LIST:-[96]} ;;
    128) VISUAL_TOKEN_NUM=${VISUAL_TOKEN_NUM:-192} IMAGE_TOKEN_LIST=${IMAGE_TOKEN_LIST:-[64]} ;;
    64) VISUAL_TOKEN_NUM=${VISUAL_TOKEN_NUM:-96} IMAGE_TOKEN_LIST=${IMAGE_TOKEN_LIST:-[32]} ;;
    none) VISUAL_TOKEN_NUM=576 IMAGE_TOKEN_LIST=[] LAYER_LIST=[] ;;
    *) fail "TOKENS=$tokens is not a published budget; choose 192, 128, 64 or none, or set VISUAL_TOKEN_NUM and IMAGE_TOKEN_LIST" ;;
  esac
  LAYER_LIST=${LAYER_LIST:-[$layer]}
  COMPRESSION=(--visual_token_num "$VISUAL_TOKEN_NUM" --layer_list "$LAYER_LIST" --image_token_list "$IMAGE_TOKEN_LIST"
    --basis_token_num "$BASIS_TOKEN_NUM" --method "$METHOD")
  if [ -z "${EXPERIMENT:-}" ]; then
    EXPERIMENT=$(basename "$MODEL")
    if [ -n "${TOKENS:-}" ] || [ "$METHOD" != apet ]; then EXPERIMENT="$EXPERIMENT-$METHOD-$tokens"; fi
  fi
}

# Number of processes: CHUNKS, or one per visible GPU, at least one.
count_chunks() {
  GPUS=()
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then IFS=, read -ra GPUS <<<"$CUDA_VISIBLE_DEVICES"; fi
  CHUNKS=${CHUNKS:-$((${#GPUS[@]} > 0 ? ${#GPUS[@]} : 1))}
}

# answer MODULE ANSWERS_FILE [FLAG ...]: answer a question file, in one process per GPU, and join the parts.
answer() {
  local module=$1 answers=$2
  shift 2
  local flags=("$@" --model-path "$MODEL" --batch_size "${BATCH_SIZE:-1}" --num_workers "${NUM_WORKERS:-4}"
    --dtype "${DTYPE:-auto}" --device "${DEVICE:-auto}" "${COMPRESSION[@]}" --resume)
  mkdir -p "$(dirname "$answers")"
  count_chunks
  if [ "$CHUNKS" -eq 1 ]; then
    "$PYTHON" -m "$module" "${flags[@]}" --answers-file "$answers" --num-chunks 1 --chunk-idx 0
    return
  fi
  answer_chunks "$module" "$answers" "${flags[@]}"
}

answer_chunks() {
  local module=$1 answers=$2 parts=() pids=() failed=0 index part
  shift 2
  for ((index = 0; index < CHUNKS; index++)); do
    part="${answers%.jsonl}.${CHUNKS}_$index.jsonl"
    parts+=("$part")
    CUDA_VISIBLE_DEVICES=${GPUS[$index % (${#GPUS[@]} > 0 ? ${#GPUS[@]} : 1)]:-} \
      "$PYTHON" -m "$module" "$@" --answers-file "$part" --num-chunks "$CHUNKS" --chunk-idx "$index" \
      >"${part%.jsonl}.log" 2>&1 &
    pids+=($!)
  done
  echo "$CHUNKS processes; logs: ${answers%.jsonl}.${CHUNKS}_*.log"
  for index in "${!pids[@]}"; do
    if ! wait "${pids[$index]}"; then
      failed=1
      echo "chunk $index failed; the end of ${parts[$index]%.jsonl}.log:" >&2
      tr '\r' '\n' <"${parts[$index]%.jsonl}.log" | tail -n 5 >&2
    fi
  done
  [ "$failed" -eq 0 ] || fail "nothing was scored; mend the cause and start the same command again, answers are kept"
  "$PYTHON" -m apet.eval.merge --answers-file "$answers" "${parts[@]}"
}

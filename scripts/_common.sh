# shellcheck shell=bash
# Sourced by scripts/<family>/<benchmark>.sh: settings from the environment, chunks over GPUs, budgets.
# What differs per benchmark is in scripts/_benchmarks/<benchmark>.sh, per model family in scripts/<family>/_family.sh.
#
#   MODEL             checkpoint folder or hub id  DATA             folder of the benchmarks (data/eval)
#   TOKENS            a published budget of the family (LLaVA-1.5: 192, 128, 64; LLaVA-1.6: 640, 320, 160;
#                     Qwen2.5-VL: 20, 30 percent; Video-LLaVA: 256), or none
#   METHOD            compression method (apet)    VISUAL_TOKEN_NUM, LAYER_LIST, IMAGE_TOKEN_LIST, BASIS_TOKEN_NUM
#                     (Qwen2.5-VL: IMAGE_TOKEN_RATIO, IMAGE_TOKEN_RATIO_LIST; Video-LLaVA: VIDEO_TOKEN_NUM)
#   COMPAT            published: the published accounting of LLaVA-1.6 images
#   OUT               root of answers and scores (DATA)             EXPERIMENT   their name (checkpoint and settings)
#   IMAGE_FOLDER      images of this benchmark     SPLIT            question file, where a benchmark has several
#   MME_PART          1: score the MME categories that are there, where some are not (the bundled sample has 5)
#   OCR               1 or 0: TextVQA with the OCR tokens in the prompt or without
#   JUDGE             chat model that judges answers about videos, behind OPENAI_BASE_URL (key: OPENAI_API_KEY)
#   BATCH_SIZE, NUM_WORKERS, DTYPE, DEVICE, CONV_MODE               as the flags of the same name
#   CUDA_VISIBLE_DEVICES                           one process per GPU; CHUNKS overrides their number
#   PYTHON            interpreter (.venv/bin/python if there is one, else python3)
#   DRY_RUN           1 prints the commands instead of running them
#
# Relative paths are relative to the repository. Arguments of a script go to the answering program, e.g. --batch_size 8;
# after --limit N nothing is scored. A script that was interrupted goes on where it stopped when it is started again;
# with --overwrite it answers everything anew in the place of answers that are there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $*" >&2
  exit 1
}

dry_run() {
  [ "${DRY_RUN:-0}" != 0 ]
}

# step COMMAND [WORD ...]: run a command, or print it.
step() {
  if dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# need FILE WHAT: stop with a sentence when an input is missing, before hours are spent on answers.
need() {
  dry_run || [ -e "$1" ] ||
    fail "$2 not found: $1 (data/README.md says where it comes from, scripts/check_data.py what else is missing; DATA and MODEL change the folders)"
}

# first_of PATH ...: the first that exists, or the first.
first_of() {
  local path
  for path in "$@"; do
    if [ -e "$path" ]; then
      echo "$path"
      return
    fi
  done
  echo "$1"
}

# run_benchmark FAMILY BENCHMARK TOKENS [FLAG ...]: all of it; TOKENS is the published budget.
run_benchmark() {
  local family=$1 tokens=$3
  BENCHMARK=$2
  shift 3
  ARGUMENTS=("$@")
  # of LLaVA; families with others set them
  VISION_BUDGET=VISUAL_TOKEN_NUM LLM_BUDGET=IMAGE_TOKEN_LIST ALL_TOKENS=576
  EXPERIMENT_GIVEN=${EXPERIMENT:-}
  settings
  check_arguments
  # shellcheck source=/dev/null
  source "scripts/$family/_family.sh"
  set_budget "${TOKENS:-$tokens}"
  need_model
  # shellcheck source=/dev/null
  source "scripts/_benchmarks/$BENCHMARK.sh"
}

settings() {
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
  fi
  # official tools run in their own folders
  if [[ $PYTHON == */* ]]; then PYTHON=$(absolute "$PYTHON"); fi
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
  DATA=${DATA:-data/eval}
  OUT=${OUT:-$DATA}
  METHOD=${METHOD:-apet}
  GPUS=()
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then IFS=, read -ra GPUS <<<"$CUDA_VISIBLE_DEVICES"; fi
  CHUNKS=${CHUNKS:-$((${#GPUS[@]} > 0 ? ${#GPUS[@]} : 1))}
  [[ $CHUNKS =~ ^[1-9][0-9]*$ ]] || fail "CHUNKS=$CHUNKS must be a number of processes, 1 or more"
}

# Flags that the script sets itself: given twice, answers would go where nothing finds them.
check_arguments() {
  local word name
  PARTIAL=0 OVERWRITE=0
  for word in ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; do
    name=${word%%=*}
    case "${name//_/-}" in
      --answers-file) fail "$name is set by this script; OUT and EXPERIMENT say where answers go" ;;
      --question-file) fail "$name is set by this script; DATA and SPLIT say which questions" ;;
      --num-chunks | --chunk-idx) fail "$name is set by this script; CHUNKS says how many processes" ;;
      --model-path) fail "$name is set by this script; MODEL says which checkpoint" ;;
      --limit) PARTIAL=1 ;;
      --overwrite) OVERWRITE=1 ;;
    esac
  done
}

need_model() {
  # owner/name may be a hub id, which only the program can look up
  if [[ ! $MODEL =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$ ]]; then need "$MODEL" "checkpoint"; fi
}

# set_budget TOKENS: flags of a published budget of the family, unless the environment gives others; names the experiment.
# VISION_BUDGET and LLM_BUDGET name the variables, and flags, of its two parts; an entry without the second has no layers.
set_budget() {
  local entry budget='' known='' given=${!VISION_BUDGET:-}${LAYER_LIST:-}${!LLM_BUDGET:-}${BASIS_TOKEN_NUM:-}
  local vision=${!VISION_BUDGET:-} llm=${!LLM_BUDGET:-}
  BASIS_TOKEN_NUM=${BASIS_TOKEN_NUM:-10}
  if [ "$1" = none ]; then
    vision=$ALL_TOKENS LAYER_LIST=[] llm=[]
  else
    for entry in "${BUDGETS[@]}"; do
      known="$known${entry%%:*}, "
      if [ "${entry%%:*}" = "$1" ]; then budget=${entry#*:}; fi
    done
    [ -n "$budget" ] ||
      fail "TOKENS=$1 is not a published budget; choose ${known}or none, or set $VISION_BUDGET and $LLM_BUDGET"
    vision=${vision:-${budget%/*}}
    llm=${llm:-[${budget#*/}]}
    if [ "$llm" = "[]" ]; then LAYER_LIST=[]; fi
    LAYER_LIST=${LAYER_LIST:-[$BUDGET_LAYER]}
  fi
  COMPRESSION=(--layer_list "$LAYER_LIST" "$(flag_of "$LLM_BUDGET")" "$llm" --basis_token_num "$BASIS_TOKEN_NUM"
    --method "$METHOD")
  if [ -n "$vision" ]; then COMPRESSION=("$(flag_of "$VISION_BUDGET")" "$vision" "${COMPRESSION[@]}"); fi
  name_experiment "$1" "$given" "$vision" "$llm"
  if [ -n "${COMPAT:-}" ]; then
    COMPRESSION+=(--compat "$COMPAT")
    variant "$COMPAT"
  fi
}

# flag_of NAME: the flag of an environment variable.
flag_of() {
  echo "--$1" | tr '[:upper:]' '[:lower:]'
}

# name_experiment TOKENS GIVEN VISION LLM: the published name (the checkpoint's) for the published run, a longer one for
# others.
name_experiment() {
  local flags="v$3-l$LAYER_LIST-t$4-b$BASIS_TOKEN_NUM"
  EXPERIMENT=${EXPERIMENT_GIVEN:-$(basename "$MODEL")}
  if [ "$1" = none ]; then
    variant none
  elif [ -n "$2" ]; then
    flags=${flags//[][ ]/}
    variant "$METHOD-${flags//,/+}"
  elif [ -n "${TOKENS:-}" ] || [ "$METHOD" != apet ]; then
    variant "$METHOD-$1"
  fi
}

# variant NAME: make the experiment's name tell what differs, unless the environment gave one.
variant() {
  EXPERIMENT=${EXPERIMENT_GIVEN:-$EXPERIMENT-$1}
}

# answer MODULE ANSWERS QUESTIONS [FLAG ...]: answer a question file, in one process per GPU, and join the parts.
answer() {
  local module=$1 answers=$2 questions=$3 parts=() index merge=("$PYTHON" -m apet.eval.merge --answers-file "$2")
  shift 3
  COMMAND=("$PYTHON" -m "$module" --model-path "$MODEL" --question-file "$questions" "$@" --conv-mode "$CONV_MODE"
    --temperature 0 --batch_size "${BATCH_SIZE:-1}" --num_workers "${NUM_WORKERS:-4}" --dtype "${DTYPE:-auto}"
    --device "${DEVICE:-auto}" "${COMPRESSION[@]}" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
  if [ "$OVERWRITE" = 0 ]; then COMMAND+=(--resume); else merge+=(--overwrite); fi
  if ! dry_run; then
    mkdir -p "$(dirname "$answers")"
    note_other_chunks "$answers"
  fi
  for ((index = 0; index < CHUNKS; index++)); do parts+=("$(part_of "$answers" "$index")"); done
  run_chunks "${parts[@]}"
  if [ "$CHUNKS" -gt 1 ]; then step "${merge[@]}" "${parts[@]}"; fi
  if [ "$PARTIAL" = 1 ]; then
    echo "not scored: --limit answers only a part of the questions; without it the same command goes on from here"
    exit 0
  fi
}

# part_of ANSWERS INDEX: the answers file of a chunk.
part_of() {
  if [ "$CHUNKS" -eq 1 ]; then echo "$1"; else echo "${1%.jsonl}.${CHUNKS}_$2.jsonl"; fi
}

# note_other_chunks ANSWERS: answers of an interrupted run in another number of chunks are not taken over.
note_other_chunks() {
  local part count
  for part in "${1%.jsonl}".*_0.jsonl; do
    count=${part%_0.jsonl}
    count=${count##*.}
    if [ -e "$part" ] && [ "$count" != "$CHUNKS" ] && [ ! -e "$1" ]; then
      echo "note: an earlier run in $count chunks was not finished; CHUNKS=$count goes on with its answers" >&2
    fi
  done
}

# run_chunks PART ...: one process per part; all must succeed. Output goes to a log each, if there are several.
run_chunks() {
  local parts=("$@") index
  PIDS=() FAILED=0
  trap 'stop_chunks; exit 130' INT TERM HUP
  for index in "${!parts[@]}"; do start_chunk "$index" "${parts[index]}"; done
  if dry_run; then return; fi
  if [ "$CHUNKS" -gt 1 ]; then echo "$CHUNKS processes; logs: $(log_of "${parts[0]%_0.jsonl}_*.jsonl")"; fi
  watch_chunks "${parts[@]}"
  trap - INT TERM HUP
  [ "$FAILED" -eq 0 ] || fail "nothing was scored; mend the cause and start the same command again: the answers so far are kept
(EXPERIMENT=<name> starts anew beside them)"
}

log_of() {
  echo "${1%.jsonl}.log"
}

start_chunk() {
  local command=("${COMMAND[@]}" --answers-file "$2" --num-chunks "$CHUNKS" --chunk-idx "$1")
  if [ "$CHUNKS" -gt 1 ] && [ ${#GPUS[@]} -gt 0 ]; then
    command=(env "CUDA_VISIBLE_DEVICES=$(gpus_of "$1")" "${command[@]}")
  fi
  if dry_run; then
    step "${command[@]}"
    return
  fi
  if [ "$CHUNKS" -eq 1 ]; then "${command[@]}" & else "${command[@]}" >"$(log_of "$2")" 2>&1 & fi
  PIDS[$1]=$!
}

# gpus_of INDEX: the GPUs of a chunk: an equal share, or in turn if there are more chunks than GPUs.
gpus_of() {
  local first=$(($1 * ${#GPUS[@]} / CHUNKS)) last=$((($1 + 1) * ${#GPUS[@]} / CHUNKS))
  if [ "$CHUNKS" -ge ${#GPUS[@]} ]; then
    echo "${GPUS[$1 % ${#GPUS[@]}]}"
  else
    (IFS=,; echo "${GPUS[*]:first:last-first}")
  fi
}

# watch_chunks PART ...: wait for all, and say at once when one fails; the others go on, their answers will be needed.
watch_chunks() {
  local parts=("$@") index
  while [ ${#PIDS[@]} -gt 0 ]; do
    for index in "${!PIDS[@]}"; do
      if kill -0 "${PIDS[index]}" 2>/dev/null; then continue; fi
      if ! wait "${PIDS[index]}"; then
        FAILED=1
        report_failure "$index" "${parts[index]}"
      fi
      unset "PIDS[index]"
    done
    sleep 0.2
  done
}

report_failure() {
  if [ "$CHUNKS" -eq 1 ]; then return; fi
  echo "chunk $1 of $CHUNKS (counted from 0) failed; the end of $(log_of "$2"):" >&2
  tr '\r' '\n' <"$(log_of "$2")" | grep -v '^ *$' | tail -n 5 >&2 || true
}

stop_chunks() {
  local without=''
  if [ "$OVERWRITE" = 1 ]; then without=' without --overwrite'; fi
  echo "stopped; the same command$without goes on from here" >&2
  if [ ${#PIDS[@]} -gt 0 ]; then kill "${PIDS[@]}" 2>/dev/null || true; fi
  wait
}

# link_into FOLDER FILE ...: some official tools want questions and answers in one folder; with OUT they are in two.
link_into() {
  local folder=$1 file
  shift
  for file in "$@"; do
    if [ -e "$file" ] && [ ! -e "$folder/$(basename "$file")" ]; then
      step ln -s "$(absolute "$file")" "$folder/$(basename "$file")"
    fi
  done
}

# official TOOL [FLAG ...]: an official scorer beside our own, in its folder, where the user has put it there.
official() {
  local tool=$1
  shift
  if [ ! -e "$tool" ]; then return; fi
  echo
  echo "== $tool"
  (cd "$(dirname "$tool")" && step "$PYTHON" "$(basename "$tool")" "$@") ||
    echo "note: $tool failed (it may want files that are not published); the score above is complete without it" >&2
}

absolute() {
  case "$1" in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
  esac
}

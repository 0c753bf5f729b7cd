#!/usr/bin/env bash
# Measures everything docs/performance.md speaks of and writes the tables: bash scripts/performance.sh [cpu|cuda]
#
#   TABLES    all tables in one file (default: docs/performance-<device>.md)
#   RUNS      tables and figures (JSON) of each measurement (default: runs/performance)
#   REPEATS   measurements of each call (default: as each command has it)
#   ONLY      measure only these, separated by spaces, e.g. "compress growth"; tables of the others stay
#   MODEL     checkpoint of the runner's measurement (default: the sample)
#
# Leave the machine alone meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
apet_env

device=${1:-cpu}
runs=${RUNS:-runs/performance}
tables=${TABLES:-docs/performance-$device.md}
model=${MODEL:-data/sample/model/llava-v1.5-sample}
repeats=()
[[ -z "${REPEATS:-}" ]] || repeats=(--repeats "$REPEATS")
mkdir -p "$runs"
parts=()

# measure NAME COMMAND FLAGS...
measure() {
    local name=$1
    shift
    parts+=("$name" "python -m apet.bench $*")
    [[ -z "${ONLY:-}" || " $ONLY " == *" $name "* ]] || return 0
    echo "[apet] $name: python -m apet.bench $*" >&2
    "$PYTHON" -m apet.bench "$@" ${repeats[@]+"${repeats[@]}"} \
        --json "$runs/$device-$name.json" --markdown "$runs/$device-$name.md" >/dev/null
}

case "$device" in
cpu)
    measure compress compress --device cpu --memory 1x2880x4096:320
    measure growth compress --device cpu --shapes 1x576x1024:96 --scaling --repeats 5
    measure methods compress --device cpu --methods all --repeats 5
    measure prefill prefill --device cpu --preset cpu-small --batch 1,4
    measure generate generate --device cpu --preset cpu-small --batch 1,4 --new_tokens 2,16
    measure eval eval --device cpu --model-path "$model" --tokens 64 --batch_size auto
    measure prefill-dinov2-smollm2 prefill --device cpu --preset dinov2-smollm2 --batch 1,8 --methods apet,apet_plus --no_published --repeats 7
    for tokens in 192 128 64; do
        measure "generate-dinov2-smollm2-$tokens" generate --device cpu --preset dinov2-smollm2 --tokens "$tokens" --methods apet,apet_plus \
            --no_published --batch 1 --new_tokens 1,8
    done
    ;;
cuda)
    measure compress compress --device cuda --dtype float32 --memory 1x2880x4096:320
    measure compress-bf16 compress --device cuda --dtype bfloat16 --methods all
    measure growth compress --device cuda --shapes 1x576x1024:96 --scaling
    for preset in llava-1.5-7b llava-1.5-13b qwen2.5-vl-7b; do
        measure "prefill-$preset" prefill --device cuda --preset "$preset" --batch 1,4,16,64
        measure "generate-$preset" generate --device cuda --preset "$preset" --batch 1,16 --new_tokens 2,16
    done
    measure prefill-llava-next-7b prefill --device cuda --preset llava-next-7b --batch 1,4,16
    measure generate-llava-next-7b generate --device cuda --preset llava-next-7b --batch 1,4 --new_tokens 2,16
    measure prefill-video-llava-7b prefill --device cuda --preset video-llava-7b --batch 1,4
    measure compiled generate --device cuda --preset llava-1.5-7b --batch 1,16 --new_tokens 2,16,128 --compile
    measure graphs prefill --device cuda --preset llava-1.5-7b --batch 1 --cuda_graphs
    measure eval eval --device cuda --model-path "$model" --tokens 64 --batch_size auto
    ;;
*)
    echo "scripts/performance.sh: '$device' must be cpu or cuda" >&2
    exit 2
    ;;
esac

{
    echo "# Measurements: $device"
    echo
    echo "Written by \`bash scripts/performance.sh $device\`; \`docs/performance.md\` says what was measured and how."
    for ((i = 0; i < ${#parts[@]}; i += 2)); do
        part=$runs/$device-${parts[i]}.md
        [[ -f "$part" ]] || continue
        printf '\n## %s\n\n`%s`\n\n' "${parts[i]}" "${parts[i + 1]}"
        cat "$part"
    done
} >"$tables"
echo "[apet] $tables" >&2

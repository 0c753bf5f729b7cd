#!/usr/bin/env bash
# One host, several GPUs:
#
#   bash examples/serving/several_gpus.sh data|tensor|pipeline GPUS [flags of vllm serve]
#
# data      every GPU holds the whole model and answers its own requests: most requests per second for small models
# tensor    the GPUs share every layer: for models that do not fit on one, and the shortest time to the first token
# pipeline  the GPUs hold different layers: for GPUs without a fast link between them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
usage="usage: bash examples/serving/several_gpus.sh data|tensor|pipeline GPUS [flags of vllm serve]"
mode=${1:?$usage} gpus=${2:?$usage}
shift 2
case $mode in
    data | tensor | pipeline) exec bash scripts/serve.sh "--$mode-parallel-size" "$gpus" "$@" ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac

